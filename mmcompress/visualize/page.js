"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const make = (tag, name, text) => Object.assign(document.createElement(tag), { className: name || "", textContent: text || "" });
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const ramp = data.style.heat.map(rgb);
  const [KEPT, MERGED, DROPPED] = [0, 1, 2];
  const MISSING = 255;
  const WIDTH = 720;
  const state = { method: data.runs[0].method, mode: "fate", stretch: true, grey: false, word: 0, stop: data.stops.length - 1, frame: 0 };
  const SMALL = 160;
  const LINES = 6;
  const pictures = data.pictures.map((source) => Object.assign(new Image(), { src: source }));
  const drawn = () => shown().flatMap((run) => [...(run.large || []), ...(run.small || [])]);
  let pointed = null;

  for (const run of data.runs) {
    const bytes = atob(run.maps);
    run.map = Uint8Array.from(bytes, (c) => c.charCodeAt(0));
    run.cells = run.visuals.reduce((sum, visual) => sum + visual.cells, 0);
    run.most = run.words.map((_, word) => run.map.subarray(word * run.cells, (word + 1) * run.cells).reduce((a, b) => (b === MISSING ? a : Math.max(a, b)), 0) / (MISSING - 1));
    run.film = run.films[0] || null;
    run.place = new Array(run.cells);
    run.visuals.forEach((visual) => visual.panes.forEach((pane) => pane.cells.forEach((cell, i) => {
      run.place[cell] = { visual, pane, row: Math.floor(i / pane.grid[1]), column: i % pane.grid[1] };
    })));
    for (const step of run.steps) {
      step.share = new Map();
      step.stands.forEach((to) => to >= 0 && step.share.set(to, (step.share.get(to) || 0) + 1));
      const known = (step.scores || []).filter((v) => v !== null);
      step.range = [known.reduce((a, b) => Math.min(a, b), Infinity), known.reduce((a, b) => Math.max(a, b), -Infinity)];
    }
  }

  // maps of the chosen sort; of anything else one run of each model
  const shown = () => data.runs.filter((run, i) => (state.mode === "map" ? run.method === state.method : data.runs.findIndex((one) => one.name === run.name) === i));
  // which frame of a video a pane is; null for pictures
  const frameOf = (visual, pane) => (visual.frame !== null ? visual.frame : pane.role === "frame" ? pane.frame : null);
  const frameName = (run, frame) => (run.film && run.film.labels[frame] ? (run.film.times ? `frame ${frame} at ${run.film.labels[frame]}` : run.film.labels[frame]) : `frame ${frame}`);
  const stepOf = (run) => run.steps[run.at_stop[Math.min(state.stop, run.at_stop.length - 1)]];
  const fateOf = (step, cell) => (step.stands[cell] < 0 ? DROPPED : step.stands[cell] === cell ? KEPT : MERGED);
  const heat = (value) => {
    const at = Math.min(Math.max(value, 0), 1) * (ramp.length - 1);
    const low = Math.min(Math.floor(at), ramp.length - 2);
    return ramp[low].map((c, i) => Math.round(c + (ramp[low + 1][i] - c) * (at - low)));
  };
  const matching = (run) => {
    const word = run.words[state.word];
    const first = shown()[0].words[state.word];
    return word && first && word.text === first.text && word.part === first.part;
  };
  const number = (value) => (value === null || value === undefined ? "none" : String(Number(value.toPrecision(3))));
  // what the brightest colour stands for: the same in all pictures of the same word
  const top = (run) => {
    if (!state.stretch) return 1;
    const alike = matching(run) ? shown().filter(matching) : [run];
    return Math.max(...alike.map((one) => one.most[state.word] || 0)) || 1;
  };
  const valueOf = (run, cell) => {
    if (state.mode === "score") {
      const step = stepOf(run);
      if (!step.scores || step.scores[cell] === null) return null;
      const [low, high] = step.range;
      return high > low ? (step.scores[cell] - low) / (high - low) : 0.5;
    }
    if (!run.words[state.word]) return null;
    const value = run.map[state.word * run.cells + cell];
    return value === MISSING ? null : value / (MISSING - 1) / run.top;
  };

  function boxOf(view, index) {
    const { pane, canvas } = view;
    const [rows, columns] = pane.grid;
    const [left, top, right, bottom] = pane.box;
    const row = Math.floor(index / columns);
    const column = index % columns;
    const x = (i) => Math.round((left + ((right - left) * i) / columns) * canvas.width);
    const y = (i) => Math.round((top + ((bottom - top) * i) / rows) * canvas.height);
    return [x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row)];
  }

  function hatch(pen, [x, y, w, h]) {
    pen.fillStyle = "rgba(0,0,0,.8)";
    pen.fillRect(x, y, w, h);
    pen.save();
    pen.beginPath();
    pen.rect(x, y, w, h);
    pen.clip();
    pen.strokeStyle = "rgba(255,255,255,.25)";
    pen.lineWidth = 1;
    pen.beginPath();
    for (let d = Math.ceil((x + y) / 10) * 10; d < x + y + w + h; d += 10) {
      pen.moveTo(d - y - h, y + h);
      pen.lineTo(d - y, y);
    }
    pen.stroke();
    pen.restore();
  }

  function draw(view) {
    const { run, pane, canvas } = view;
    const pen = canvas.getContext("2d");
    const step = stepOf(run);
    const fate = state.mode === "fate";
    const picture = pictures[pane.picture];
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.filter = state.grey && state.mode === "map" ? "grayscale(1)" : "none";
    if (picture.complete && picture.naturalWidth) pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    pen.filter = "none";
    pane.cells.forEach((cell, i) => {
      const box = boxOf(view, i);
      const now = fateOf(step, cell);
      if (fate) {
        const hue = step.hues[step.stands[cell]];
        if (now === DROPPED) pen.fillStyle = `rgba(0,0,0,${1 - data.style.dim})`;
        else pen.fillStyle = hue === undefined ? "transparent" : `hsl(${hue} 85% 55% / ${data.style.tint})`;
        pen.fillRect(...box);
        if (now === KEPT) {
          pen.strokeStyle = "#fff";
          pen.lineWidth = view.small ? 1 : 1.5;
          pen.strokeRect(box[0] + 1, box[1] + 1, box[2] - 2, box[3] - 2);
        }
        return;
      }
      if (state.mode === "score" && !step.scores) return;
      const value = valueOf(run, cell);
      if (value === null || (state.mode === "map" && now === DROPPED)) return hatch(pen, box);
      pen.fillStyle = `rgba(${heat(value).join(",")},${data.style.glow[0] + data.style.glow[1] * value})`;
      pen.fillRect(...box);
    });
    const [rows, columns] = pane.grid;
    const [left, top, right, bottom] = pane.box;
    pen.strokeStyle = `rgb(${data.style.seam.join(",")})`;
    pen.lineWidth = view.small ? 1 : 3;
    pen.beginPath();
    for (const seam of pane.seams[0]) {
      const y = (top + ((bottom - top) * seam) / rows) * canvas.height;
      pen.moveTo(left * canvas.width, y);
      pen.lineTo(right * canvas.width, y);
    }
    for (const seam of pane.seams[1]) {
      const x = (left + ((right - left) * seam) / columns) * canvas.width;
      pen.moveTo(x, top * canvas.height);
      pen.lineTo(x, bottom * canvas.height);
    }
    pen.stroke();
    if (pointed && !view.small && pointed.run.visuals.length === run.visuals.length) {
      const at = pane.cells.indexOf(pointed.cell);
      const to = step.stands[pointed.cell];
      if (to >= 0 && (step.share.get(to) || 0) > 1) pane.cells.forEach((cell, i) => step.stands[cell] === to && ring(pen, boxOf(view, i), "#fff", 1.5));
      if (at >= 0) ring(pen, boxOf(view, at), "#22d3ee", 4);
    }
  }

  function ring(pen, [x, y, w, h], colour, wide) {
    pen.lineWidth = wide + 2;
    pen.strokeStyle = "#000";
    pen.strokeRect(x, y, w, h);
    pen.lineWidth = wide;
    pen.strokeStyle = colour;
    pen.strokeRect(x, y, w, h);
  }

  function describe(run, cell) {
    const { visual, pane, row, column } = run.place[cell];
    const step = stepOf(run);
    const [rows, columns] = pane.grid;
    const [left, top, right, bottom] = pane.box;
    const per = (from, to, i, n) => Math.round(100 * (from + ((to - from) * i) / n));
    const where = frameOf(visual, pane) !== null ? `${visual.name}, ${frameName(run, frameOf(visual, pane))}` : pane.role === "thumbnail" ? `${visual.name}, thumbnail` : visual.name;
    const parts = [
      `${where}: row ${row + 1}, column ${column + 1} (x ${per(left, right, column, columns)}–${per(left, right, column + 1, columns)} %, y ${per(top, bottom, row, rows)}–${per(top, bottom, row + 1, rows)} %)`,
    ];
    const word = run.words[state.word];
    if (word) {
      const value = run.map[state.word * run.cells + cell];
      parts.push(`map of “${word.text}” ${value === MISSING ? "missing" : (value / (MISSING - 1)).toFixed(2)}`);
    }
    const scored = step.scores ? step : null;
    if (scored) parts.push(`score of ${scored.stage.split("(")[0]} ${number(scored.scores[cell])}`);
    const to = step.stands[cell];
    if (to < 0) {
      const gone = run.steps.find((one) => one.stands[cell] < 0);
      parts.push(`dropped ${gone.place}${gone.stage ? ` by ${gone.stage}` : ""}`);
    } else {
      const share = step.share.get(to);
      const other = run.place[to];
      const together = share > 1 ? `, ${share} tokens together` : "";
      parts.push(to === cell ? `kept${together}` : `merged into row ${other.row + 1}, column ${other.column + 1}${other.pane !== pane ? ` of another view` : ""}${together}`);
    }
    return `${run.name} — ${parts.join(" · ")}`;
  }

  // beside a mouse; at the foot of the window for keys and fingers
  function point(run, cell, event) {
    pointed = { run, cell };
    const detail = by("detail");
    detail.textContent = describe(run, cell);
    detail.className = event && event.pointerType === "mouse" ? "near" : "";
    detail.style.cssText = detail.className && `left: ${Math.max(0, Math.min(event.clientX + 16, innerWidth - 400))}px; top: ${event.clientY + 20}px`;
    if (detail.className && event.clientY + 20 + detail.offsetHeight > innerHeight) detail.style.top = `${Math.max(0, event.clientY - 12 - detail.offsetHeight)}px`;
    redraw();
  }

  const redraw = () => drawn().forEach(draw);

  function view(run, visual, pane) {
    const figure = make("figure", pane.role);
    const canvas = make("canvas");
    const [rows, columns] = pane.grid;
    canvas.width = pane.role === "thumbnail" ? WIDTH / 2 : WIDTH;
    canvas.height = Math.max(1, Math.round((canvas.width * pane.size[1]) / pane.size[0]));
    figure.style.setProperty("--shape", pane.size[0] / pane.size[1]);
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-roledescription", "grid of tokens");
    canvas.setAttribute("aria-label", `${run.name}: ${visual.name}${pane.role === "image" ? "" : `, ${pane.role}`}, ${rows} rows of ${columns} tokens; the arrow keys go from token to token`);
    canvas.setAttribute("aria-describedby", "detail");
    const one = { run, visual, pane, canvas, cursor: 0 };
    const go = (index, event) => {
      one.cursor = index;
      point(run, pane.cells[index], event);
    };
    canvas.addEventListener("pointermove", (event) => find(event));
    canvas.addEventListener("pointerdown", (event) => find(event));
    canvas.addEventListener("focus", () => go(one.cursor));
    canvas.addEventListener("keydown", (event) => {
      const [row, column] = [Math.floor(one.cursor / columns), one.cursor % columns];
      const to = {
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        Home: [row, 0], End: [row, columns - 1], PageUp: [0, column], PageDown: [rows - 1, column],
      }[event.key];
      if (!to) return;
      event.preventDefault();
      go(Math.min(Math.max(to[0], 0), rows - 1) * columns + Math.min(Math.max(to[1], 0), columns - 1));
    });
    function find(event) {
      const area = canvas.getBoundingClientRect();
      const [left, top, right, bottom] = pane.box;
      const column = Math.floor((((event.clientX - area.left) / area.width - left) / (right - left)) * columns);
      const row = Math.floor((((event.clientY - area.top) / area.height - top) / (bottom - top)) * rows);
      const index = row * columns + column;
      if (row >= 0 && row < rows && column >= 0 && column < columns) go(index, event);
    }
    canvas.addEventListener("pointerleave", () => (by("detail").className = by("detail").style.cssText = ""));
    figure.append(canvas, make("figcaption", "", frameOf(visual, pane) !== null ? frameName(run, frameOf(visual, pane)) : pane.role === "image" ? "" : pane.role));
    return [figure, one];
  }

  // the pictures of a run, of its videos the frame that the slider is at
  function fill(run) {
    run.large = [];
    run.views.replaceChildren(...run.visuals.flatMap((visual) => {
      const views = make("div", "views");
      const panes = visual.panes.filter((pane) => [null, state.frame].includes(frameOf(visual, pane)));
      for (const pane of panes.sort((a, b) => (a.role === "thumbnail") - (b.role === "thumbnail"))) {
        const [figure, one] = view(run, visual, pane);
        views.append(figure);
        run.large.push(one);
      }
      return panes.length ? [views] : [];
    }));
  }

  // all frames of its first video, small
  function reel(run) {
    const row = make("div", "reel");
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", `${run.name}: all frames`);
    run.film.places.forEach(([number, frame], i) => {
      const visual = run.visuals[number];
      const pane = visual.panes.find((one) => one.role !== "frame" || one.frame === frame);
      const button = make("button", "shot");
      const canvas = make("canvas");
      canvas.width = SMALL;
      canvas.height = Math.max(1, Math.round((SMALL * pane.size[1]) / pane.size[0]));
      canvas.setAttribute("aria-hidden", "true");
      button.type = "button";
      button.dataset.frame = i;
      button.append(canvas, make("div", "said", run.film.labels[i]), make("div", "said much"));
      button.addEventListener("click", () => set({ frame: i }));
      run.small.push({ run, visual, pane, canvas, small: true });
      row.append(button);
    });
    return row;
  }

  function build() {
    pointed = null;
    const parts = shown().map((run) => {
      const article = make("article", run.steps.length > 1 ? "reduced" : "");
      article.append(make("h3", "", run.name), make("p", "note step"));
      for (const part of ["question", "answer"]) {
        const line = make("p", "words of-map");
        line.append(make("span", "part", `${part}:`));
        run.words.forEach((word, i) => {
          if (word.part !== part) return;
          const button = make("button", "word", word.text);
          button.type = "button";
          if (word.strength !== null) {
            const colour = heat(word.strength);
            button.style.background = `rgb(${colour.join(",")})`;
            button.style.color = colour[0] * 0.3 + colour[1] * 0.6 + colour[2] * 0.1 > 127 ? "#000" : "#fff";
          }
          button.title = word.strength === null ? "not explained" : `strongest ${number(word.strength)}${word.probability === null ? "" : `, probability ${number(word.probability)}`}`;
          button.dataset.word = i;
          button.addEventListener("click", () => set({ word: i }));
          line.append(button);
        });
        if (line.childElementCount > 1) article.append(line);
      }
      run.views = make("div");
      article.append(run.views);
      run.small = [];
      if (run.film) article.append(reel(run));
      run.article = article;
      fill(run);
      return article;
    });
    by("runs").replaceChildren(...parts);
    const frames = Math.max(0, ...shown().flatMap((run) => run.films.map((film) => film.labels.length)));
    by("frames").hidden = frames < 2;
    by("frame").max = Math.max(frames - 1, 0);
    by("word").max = Math.max(0, ...shown().map((run) => run.words.length - 1));
    by("word").disabled = !Number(by("word").max) && !shown()[0].words.length;
    charts();
  }

  function charts() {
    by("counts").replaceChildren(...shown().map((run) => {
      const most = Math.max(...shown().flatMap((one) => one.layers));
      const chart = make("div", "chart");
      chart.setAttribute("role", "img");
      chart.setAttribute("aria-label", `${run.name}: ${run.layers.join(", ")}`);
      run.layers.forEach((count, layer) => {
        const bar = make("div", "bar");
        bar.style.height = `${(80 * count) / most}%`;
        if (run.layers.length <= 12 || layer === 0 || run.layers[layer - 1] !== count) bar.append(make("span", "", String(count)));
        bar.title = `layer ${layer}: ${count}`;
        bar.dataset.layer = layer;
        chart.append(bar);
      });
      const box = make("div");
      box.append(make("div", "note", run.name), chart);
      return box;
    }));
  }

  // the largest value of the word's map in each frame
  const overTime = (run) => run.film.cells.map((cells) => {
    const values = cells.map((cell) => run.map[state.word * run.cells + cell]).filter((value) => value !== MISSING);
    return values.length ? Math.max(...values) / (MISSING - 1) : null;
  });

  // a plot: lines are { name, values, style }
  function curve(title, film, lines) {
    const box = make("div", "curve");
    const at = film.times || film.labels.map((_, i) => i);
    const span = at[at.length - 1] - at[0] || 1;
    const most = Math.max(...lines.flatMap((line) => line.values.map((value) => value || 0))) || 1;
    const x = (i) => (at.length > 1 ? (100 * (at[i] - at[0])) / span : 50);
    const y = (value) => 100 - (100 * value) / most;
    const svg = by("plot").content.firstElementChild.cloneNode();
    const path = (name, d, colour) => {
      const one = document.createElementNS(svg.namespaceURI, "path");
      one.setAttribute("d", d);
      one.setAttribute("class", name);
      if (colour) one.style.stroke = colour;
      svg.append(one);
      return one;
    };
    svg.setAttribute("aria-label", `${title}: ${lines.map((line) => `${line.name}: ${line.values.map(number).join(", ")}`).join("; ")}`);
    for (const part of [0, 50, 100]) path("grid", `M0 ${part}H100`);
    path("cursor", "").dataset.x = JSON.stringify(at.map((_, i) => x(i)));
    const list = make("ul");
    for (const { name, values, style } of lines) {
      const colour = `var(--line${style % LINES})`;
      let d = "";
      values.forEach((value, i) => (d += value === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${x(i)} ${y(value)}`));
      path("", d, colour);
      path("dots", values.map((value, i) => (value === null ? "" : `M${x(i)} ${y(value)}h0`)).join(""), colour);
      const item = make("li");
      const key = make("span", "key");
      key.style.borderColor = colour;
      item.append(key, name);
      list.append(item);
    }
    svg.addEventListener("click", (event) => {
      const area = svg.getBoundingClientRect();
      const wanted = (100 * (event.clientX - area.left)) / area.width;
      set({ frame: at.reduce((best, _, i) => (Math.abs(x(i) - wanted) < Math.abs(x(best) - wanted) ? i : best), 0) });
    });
    const ticks = make("div", "ticks");
    ticks.append(...[most, most / 2, 0].map((value) => make("span", "", number(value))));
    const below = make("div", "ticks below");
    const unit = (value) => (film.times ? `${number(value)} s` : number(value));
    below.append(make("span", "", film.times ? unit(at[0]) : `frame ${at[0]}`), make("span", "", unit(at[at.length - 1])));
    box.append(make("h3", "", title), ticks, svg, below, list);
    return box;
  }

  function curves() {
    const runs = shown().filter((run) => run.film);
    by("time").hidden = !runs.length;
    const reduced = runs.filter((run) => run.steps.length > 1);
    const plots = (reduced.length ? reduced : runs.slice(0, 1)).map((run) => {
      const lines = run.steps.map((step, i) => ({
        name: `${step.stage ? `${step.place}: ${step.stage}` : step.place} (${run.film.tokens[i].reduce((a, b) => a + b, 0)})`,
        values: run.film.tokens[i],
        style: i,
      }));
      return curve(`${run.name}: tokens of each frame`, run.film, lines);
    });
    const word = runs.map((run) => run.words[state.word]).find(Boolean);
    if (word) {
      const lines = runs.filter((run) => run.words[state.word]).map((run, i) => ({ name: `${run.name}: “${run.words[state.word].text}”`, values: overTime(run), style: i }));
      plots.push(curve(`${runs.find((run) => run.words[state.word]).method} of ${lines.length > 1 && !runs.every(matching) ? "a word" : `“${word.text}”`}: the most in each frame`, runs[0].film, lines));
    }
    by("curves").replaceChildren(...plots);
  }

  function legend(ramp, brightest) {
    const part = (name, text) => {
      const one = make("span");
      one.append(...(name ? [make("span", `swatch ${name}`)] : []), text);
      return one;
    };
    if (state.mode === "fate") return [part("kept", "kept"), part("merged", "merged, one colour for each token"), part("dropped", "dropped")];
    const [low, high, unseen] = state.mode === "map" ? ["0", `${brightest}: how much a place has to do with it`, "hatched: no token"] : ["lowest", "highest, by which the stage chose", "hatched: not seen"];
    const scale = make("span");
    scale.style.whiteSpace = "normal";
    scale.append(low, ramp, high);
    return [scale, part("none", unseen)];
  }

  function update() {
    const runs = shown();
    const word = runs.map((run) => run.words[state.word]).find(Boolean);
    by("word").value = state.word;
    by("word-is").textContent = word ? `“${word.text}” (${word.part})` : "none";
    by("word").setAttribute("aria-valuetext", by("word-is").textContent);
    by("layer").value = state.stop;
    by("layer-is").textContent = data.stops[state.stop] + (state.stop === data.stops.length - 1 ? ", the last" : "");
    by("layer").setAttribute("aria-valuetext", by("layer-is").textContent);
    by("frame").value = state.frame;
    by("frame-is").textContent = frameName(runs[0], state.frame).replace(/^frame /, "");
    by("frame").setAttribute("aria-valuetext", frameName(runs[0], state.frame));
    const layer = state.stop - data.early;
    document.querySelectorAll(".bar").forEach((bar) => bar.classList.toggle("now", Number(bar.dataset.layer) === layer));
    for (const run of runs) {
      const step = stepOf(run);
      const what = step.stage ? `${step.place}: ${step.stage}` : "nothing dropped yet";
      const [kept, merged, dropped] = step.fates;
      let note = `${what}; ${kept} of ${run.cells} visual tokens kept${merged ? `, ${merged} merged into them` : ""}${dropped ? `, ${dropped} dropped` : ""}`;
      run.top = top(run);
      if (state.mode === "score" && !step.scores) note += "; no scores here";
      if (state.mode === "map" && run.words[state.word]) note += run.words[state.word].strength === null ? "; this word was not explained" : `; map up to ${number(run.most[state.word])}`;
      if (state.mode === "map" && !matching(run)) note += "; another word stands here in this answer";
      run.article.querySelector(".step").textContent = note;
      run.article.querySelectorAll(".shot").forEach((button) => {
        const i = Number(button.dataset.frame);
        const value = state.mode === "map" && run.words[state.word] ? overTime(run)[i] : null;
        const tokens = run.film.tokens[run.steps.indexOf(step)][i];
        button.querySelector(".much").textContent = state.mode !== "map" ? `${tokens} tokens` : value === null ? "no token" : `up to ${value.toFixed(2)}`;
        button.setAttribute("aria-label", `${frameName(run, i)}, ${tokens} of ${run.film.cells[i].length} tokens`);
        button.setAttribute("aria-pressed", String(i === state.frame));
      });
      run.article.querySelectorAll(".word").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.word) === state.word)));
    }
    const gradient = `linear-gradient(90deg, ${data.style.heat.join(",")})`;
    const box = make("span", "ramp");
    box.style.background = gradient;
    const brightest = state.stretch ? `${[...new Set(runs.map((run) => number(run.top)))].join(" or ")}, the most for this word` : "1, the most for any word";
    by("faithful").textContent = `Shown: ${state.method}. How faithful: ${data.faithful[state.method]}.`;
    by("legend").replaceChildren(...legend(box, brightest).flatMap((one) => [one, " "]));
    curves();
    document.querySelectorAll(".cursor").forEach((line) => {
      const x = JSON.parse(line.dataset.x)[state.frame];
      line.setAttribute("d", x === undefined ? "" : `M${x} 0V100`);
    });
    redraw();
    if (pointed) by("detail").textContent = describe(pointed.run, pointed.cell);
  }

  function set(change) {
    const again = ["method", "mode"].some((name) => name in change);
    Object.assign(state, change);
    document.body.dataset.mode = state.mode;
    if (again) build();
    else if ("frame" in change) {
      pointed = null;
      shown().forEach(fill);
      document.querySelectorAll(`.shot[data-frame="${state.frame}"]`).forEach((shot) => {
        const [one, all] = [shot.getBoundingClientRect(), shot.parentNode.getBoundingClientRect()];
        if (one.left < all.left || one.right > all.right) shot.parentNode.scrollLeft += one.left - all.left - (all.width - one.width) / 2;
      });
    }
    update();
  }

  [...new Set(data.runs.map((run) => run.method))].forEach((name) => {
    const label = make("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "method", value: name, checked: name === state.method });
    radio.addEventListener("change", () => set({ method: name }));
    const score = /F1-IoU [\d.]+/.exec(data.faithful[name]);
    label.append(radio, ` ${name}${score ? ` (${score[0]} %)` : ""}`);
    by("methods").append(label);
  });
  by("grey").addEventListener("change", (event) => set({ grey: event.target.checked }));
  by("word").addEventListener("input", (event) => set({ word: Number(event.target.value) }));
  by("stretch").addEventListener("change", (event) => set({ stretch: event.target.checked }));
  by("layer").max = data.stops.length - 1;
  by("layer").addEventListener("input", (event) => set({ stop: Number(event.target.value) }));
  by("frame").addEventListener("input", (event) => set({ frame: Number(event.target.value) }));
  document.querySelectorAll("[name=mode]").forEach((radio) => radio.addEventListener("change", () => set({ mode: radio.value })));
  let timer = 0;
  const step = () => {
    const { film } = shown().find((run) => run.film);
    timer = setTimeout(() => {
      set({ frame: (state.frame + 1) % (Number(by("frame").max) + 1) });
      step();
    }, film.milliseconds[state.frame]);
  };
  by("play").addEventListener("click", () => {
    const playing = by("play").getAttribute("aria-pressed") === "true";
    clearTimeout(timer);
    if (!playing) step();
    by("play").setAttribute("aria-pressed", String(!playing));
    by("play").textContent = playing ? "play" : "pause";
  });
  state.word = data.word;
  const worded = data.runs[0].words.length > 0;
  const reduced = data.runs.some((run) => run.steps.some((step) => step.fates[1] + step.fates[2]));
  const mode = worded && !reduced ? "map" : "fate";
  document.querySelector("[value=map]").closest("label").hidden = !worded;
  document.querySelector(`[value=${mode}]`).checked = true;
  set({ mode });
  pictures.forEach((picture) => picture.decode().catch(() => {}).then(() => redraw()));
})();
