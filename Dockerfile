# docker build --target cpu -t mmcompress .         docker run --rm mmcompress methods
# docker build --target cuda -t mmcompress:cuda .   docker run --rm --gpus all mmcompress:cuda demo
# Serving has an image of its own: docs/serving.md. The CUDA target was not run on a GPU yet.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS source
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mmcompress mmcompress
COPY adapters adapters
COPY kernels kernels
COPY eval eval
COPY assets assets

FROM python:${PYTHON}-slim AS cpu
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY --from=source /src /src
RUN pip install --no-cache-dir "/src[viz,eval]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["mmcompress"]
CMD ["--help"]

# the wheels of PyTorch bring CUDA; Triton compiles its launcher with gcc
FROM python:${PYTHON}-slim AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch torchvision
COPY --from=source /src /src
RUN pip install --no-cache-dir "/src[viz,eval]" && rm -rf /src
WORKDIR /work
ENTRYPOINT ["mmcompress"]
CMD ["--help"]
