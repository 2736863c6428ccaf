// Draws the charts of `albor report` with plotly.js. Everything that a run wrote is text to this file: it is
// put into the page by textContent alone, and what plotly.js shows goes through plain() first.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  for (const run of runs)
    for (const series of Object.values(run.series))
      series.t ||= series.s.map((step) => step * run.tokens_per_step);
  const state = { axis: "t", logX: false, logY: false, range: null, hidden: new Set(), heatRun: 0, heatPart: "block" };
  const AXES = { t: "tokens", h: "hours of training", s: "steps" };
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const COLOURS = 6; // --run-0 to --run-5
  const root = document.documentElement;
  const printing = { now: false };

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colour = (run) => css(`--run-${run % COLOURS}`);
  const dash = (run) => DASHES[Math.floor(run / COLOURS) % DASHES.length];
  // plotly.js takes a few HTML tags in its texts for markup.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const many = runs.length > 1;
  const shown = (run) => !state.hidden.has(run);
  const narrow = () => window.innerWidth < 560;
  const ending = (text, length) => (text.length > length ? "…" + text.slice(1 - length) : text);

  function layout(chart, more) {
    const ink = css("--ink"), grid = css("--grid"), panel = css("--panel"), line = css("--line");
    const base = {
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, size: 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: narrow() ? 52 : 66, r: 14, t: 12, b: 42 },
      showlegend: false, hovermode: "x unified", dragmode: "zoom",
      hoverlabel: { bgcolor: panel, bordercolor: line, font: { color: ink, size: 12 }, namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent"), orientation: "v" },
    };
    const axis = { gridcolor: grid, linecolor: line, zerolinecolor: line, automargin: true, exponentformat: "power" };
    const full = { ...base, ...more };
    full.xaxis = { ...axis, ...(more.xaxis || {}) };
    full.yaxis = { ...axis, ...(more.yaxis || {}) };
    return full;
  }

  // All charts over the run show the same stretch of it: what was chosen, or all that any run has.
  function stretch() {
    if (state.range) return state.range.slice();
    const ends = runs.flatMap((run, index) => (shown(index) ? run.span[state.axis] : [])).filter((x) => x !== null);
    if (!ends.length) return [0, 1];
    if (!state.logX) {
      const high = Math.max(...ends);
      return [-0.015 * high, 1.015 * high];
    }
    const low = Math.log10(Math.max(Math.min(...ends), Math.max(...ends) / 1e6)), high = Math.log10(Math.max(...ends));
    const edge = 0.015 * (high - low || 1);
    return [low - edge, high + edge];
  }

  function runAxis() {
    const hours = state.axis === "h";
    return {
      title: { text: AXES[state.axis], standoff: 6 }, type: state.logX ? "log" : "linear", range: stretch(),
      exponentformat: hours ? "power" : "B", hoverformat: hours ? ",.4~g" : ",d", zeroline: false,
      unifiedhovertitle: { text: `%{x} ${hours ? "hours" : AXES[state.axis]}` },
    };
  }

  // The vertical range of what is drawn within the stretch; undefined where nothing is.
  function heights(traces, log, zero) {
    let [low, high] = stretch();
    if (state.logX) [low, high] = [10 ** low, 10 ** high];
    let least = Infinity, most = -Infinity;
    for (const trace of traces)
      trace.x.forEach((x, place) => {
        const y = trace.y[place];
        if (y === null || (log && y <= 0) || (!trace.meta.level && (x === null || x < low || x > high))) return;
        least = Math.min(least, y);
        most = Math.max(most, y);
      });
    if (least > most) return undefined;
    if (log) [least, most] = [Math.log10(least), Math.log10(most)];
    else if (zero) least = Math.min(0, least);
    const edge = 0.06 * (most - least) || 0.06 * Math.abs(most) || 1;
    return [zero && !log && least === 0 ? 0 : least - edge, most + edge];
  }

  // The horizontal places of a series' points on the axis that is chosen.
  const places = (series) => series[state.axis];

  function lineTraces(chart) {
    const traces = [];
    runs.forEach((run, index) => {
      for (const metric of chart.metrics) {
        const series = run.series[metric.name];
        if (!series || !shown(index)) continue;
        const points = metric.style === "points";
        const faint = metric.style === "faint";
        const name = `${many ? plain(run.label) + ", " : ""}${metric.label}`;
        traces.push({
          type: "scatter", mode: points ? "lines+markers" : "lines", name,
          x: places(series), y: series.y.map((y) => (y === null ? null : y / chart.scale)), connectgaps: false, meta: { run: index, name: metric.name },
          line: {
            color: colour(index), width: points ? 2.2 : faint ? 1.1 : 1.6,
            dash: metric.style === "dashed" ? "dash" : dash(index),
          },
          marker: { color: colour(index), size: series.y.length > 60 ? 4 : 7, symbol: points ? "circle" : "line-ns" },
          opacity: faint ? 0.72 : 1,
          hovertemplate: `${name}: %{y:${chart.format}}<extra></extra>`,
        });
      }
    });
    return traces;
  }

  const levelsOf = (chart) => chart.references.filter((level) => level.run === null || shown(level.run));

  // Level lines over the whole stretch.
  function levelTraces(chart) {
    const x = stretch().map((end) => (state.logX ? 10 ** end : end));
    return levelsOf(chart).map((level) => ({
      type: "scatter", mode: "lines", x, y: [level.y, level.y], hoverinfo: "skip",
      line: { color: level.run === null ? css("--soft") : colour(level.run), width: 1.4, dash: "dot" },
      meta: { run: level.run, name: null, level: true },
    }));
  }

  // Their names, where one line is for all runs; of many, the colour tells which is whose.
  function levelNames(chart, log) {
    return levelsOf(chart).filter((level) => level.run === null).map((level) => ({
      text: plain(level.label), showarrow: false, xref: "paper", x: 1, xanchor: "right", yanchor: "bottom",
      y: log ? Math.log10(level.y) : level.y, font: { color: css("--soft"), size: 11 },
    }));
  }

  function drawLine(chart) {
    const log = state.logY && chart.log;
    const traces = lineTraces(chart);
    if (traces.length) traces.push(...levelTraces(chart));
    return [traces, layout(chart, {
      annotations: traces.length ? levelNames(chart, log) : [],
      xaxis: runAxis(),
      yaxis: {
        type: log ? "log" : "linear", tickformat: chart.ticks || "", range: heights(traces, log, chart.zero),
        fixedrange: true, title: { text: plain(chart.unit), standoff: 6 }, zeroline: false,
        exponentformat: chart.id === "speed" ? "B" : "power",
      },
    })];
  }

  function drawHeat() {
    const run = runs[state.heatRun];
    const map = run.heat && (run.heat.maps[state.heatPart] || Object.values(run.heat.maps)[0]);
    if (!map) return [[], layout(null, { annotations: [nothing("not measured in this run")] })];
    const x = run.heat[state.axis];
    const usable = x.every((value) => value !== null);
    const z = map.z.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null)));
    const finite = z.flat().filter((value) => value !== null);
    const low = Math.floor(Math.min(...finite)), high = Math.ceil(Math.max(...finite));
    const ticks = [];
    for (let power = low; power <= high; power++) ticks.push(power);
    return [[{
      type: "heatmap", x: usable ? x : run.heat.s, y: map.groups.map(plain), z, text: map.z, colorscale: "Viridis",
      hovertemplate: "%{y}, up to %{x}<br>norm %{text:.4g}<extra></extra>", hoverongaps: false,
      colorbar: {
        tickvals: ticks, ticktext: ticks.map((power) => `10<sup>${power}</sup>`.replace("-", "−")), thickness: 12,
        outlinewidth: 0, ...(narrow() ? { orientation: "h", y: -0.2, len: 1, thickness: 10 } : {}),
      },
      meta: { run: state.heatRun, name: null },
    }], layout(null, {
      hovermode: "closest", xaxis: { ...runAxis(), showgrid: false },
      yaxis: { type: "category", tickfont: { size: narrow() ? 9 : 11 }, showgrid: false, fixedrange: true },
      margin: { l: 70, r: 10, t: 12, b: narrow() ? 74 : 42 },
    })];
  }

  const nothing = (text) => ({ text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 });

  const PATTERNS = [["/", "-45deg"], ["\\", "45deg"], ["-", "0deg"], ["|", "90deg"]];

  // Stacked bars: what was planned, and below it what was measured.
  function drawMemory(chart) {
    const rows = [], names = [];
    runs.forEach((run, index) => {
      if (!run.memory || !shown(index)) return;
      const short = many ? ending(run.label, narrow() ? 14 : 26) + ", " : "";
      rows.push({ label: plain(short + "planned"), parts: run.memory.planned });
      rows.push({ label: plain(short + "measured") , parts: run.memory.measured });
      for (const part of [...Object.keys(run.memory.planned), ...Object.keys(run.memory.measured)])
        if (!names.includes(part)) names.push(part);
    });
    const unit = 2 ** 30;
    const largest = Math.max(...rows.map((row) => Object.values(row.parts).reduce((a, b) => a + b, 0)), 1);
    const [size, word] = largest >= unit ? [unit, "GiB"] : [2 ** 20, "MiB"];
    names.sort((a, b) => (b === "arena") - (a === "arena")); // below the parts that the plan has of it
    const look = (name, place) => ({
      color: data.components[name] || (name === "arena" ? "#7d8b99" : css(`--run-${place % COLOURS}`)),
      shape: data.components[name] || name === "arena" ? "" : PATTERNS[place % PATTERNS.length][0],
    });
    const traces = names.map((name, place) => {
      const { color, shape } = look(name, place);
      return {
        type: "bar", orientation: "h", name: plain(name), y: rows.map((row) => row.label),
        x: rows.map((row) => (row.parts[name] === undefined ? null : row.parts[name] / size)),
        marker: { color, line: { color: css("--soft"), width: 0.6 }, pattern: { shape, size: 6, solidity: 0.4 } },
        hovertemplate: `${plain(name)}: %{x:,.4~g} ${word}<extra>%{y}</extra>`, meta: { run: null, name: null },
      };
    });
    const key = document.getElementById("memory-key");
    key.replaceChildren(...names.map((name, place) => {
      const { color, shape } = look(name, place);
      const item = document.createElement("li"), patch = document.createElement("i");
      const angle = (PATTERNS.find(([known]) => known === shape) || [])[1];
      patch.style.background = shape ? `repeating-linear-gradient(${angle}, ${color} 0 2px, transparent 2px 5px)` : color;
      item.append(patch, name);
      return item;
    }));
    rows.forEach((row, place) => {
      if (!Object.keys(row.parts).length) row.missing = place;
    });
    return [traces, layout(chart, {
      barmode: "stack", hovermode: "closest", bargap: 0.3,
      xaxis: { title: { text: word, standoff: 6 }, rangemode: "tozero" },
      yaxis: { type: "category", autorange: "reversed", showgrid: false },
      annotations: rows.filter((row) => row.missing !== undefined).map((row) => ({
        text: "not measured", showarrow: false, x: 0, xanchor: "left", y: row.label, font: { color: css("--soft") },
      })),
      margin: { l: 70, r: 14, t: 8, b: 42 },
    })];
  }

  function drawShares(chart) {
    const traces = [];
    runs.forEach((run, index) => {
      if (!run.shares.length || !shown(index)) return;
      const sources = run.shares.map((share) => plain(ending(share.source, narrow() ? 20 : 44)));
      for (const [key, label] of [["asked", "by weight"], ["read", "read"]]) {
        if (run.shares.every((share) => share[key] === null)) continue;
        const name = `${many ? plain(run.label) + ", " : ""}${label}`;
        traces.push({
          type: "bar", orientation: "h", name, y: sources, x: run.shares.map((share) => share[key]),
          marker: {
            color: key === "read" ? colour(index) : "rgba(0,0,0,0)", line: { color: colour(index), width: 2 },
          },
          hovertemplate: `%{y}<br>${name}: %{x:.2%}<extra></extra>`, meta: { run: index, name: null },
        });
      }
    });
    return [traces, layout(chart, {
      barmode: "group", hovermode: "closest", bargap: 0.35,
      xaxis: { tickformat: ".0%", rangemode: "tozero" },
      yaxis: { type: "category", autorange: "reversed", showgrid: false, ticksuffix: " " },
      margin: { l: 70, r: 14, t: 8, b: 34 },
    })];
  }

  const SYMBOLS = ["triangle-right", "square", "diamond", "x", "triangle-left", "star", "circle", "cross"];

  function drawTimeline(chart) {
    const lanes = data.lanes;
    const visible = runs.map((_, index) => index).filter(shown);
    const traces = visible.map((index, place) => {
      const events = runs[index].events.filter((event) => event[axisOfEvent()] !== null);
      const offset = visible.length > 1 ? 0.6 * (place / (visible.length - 1) - 0.5) : 0;
      return {
        type: "scatter", mode: "markers", name: plain(runs[index].label),
        x: events.map((event) => event[axisOfEvent()]), y: events.map((event) => lanes.indexOf(event.lane) + offset),
        marker: {
          color: colour(index), size: 9, symbol: events.map((event) => SYMBOLS[lanes.indexOf(event.lane)]),
          line: { color: css("--panel"), width: 1 },
        },
        text: events.map((event) => plain(many ? `${runs[index].label}: ` : "") + plain(event.kind) +
          (event.step === null ? "" : `, step ${event.step.toLocaleString("en")}`) +
          (event.text ? `<br>${plain(event.text.slice(0, 140))}` : "")),
        hovertemplate: "%{text}<extra></extra>", meta: { run: index, name: null },
      };
    });
    return [traces, layout(chart, {
      hovermode: "closest", xaxis: runAxis(),
      yaxis: {
        tickvals: lanes.map((_, place) => place), ticktext: lanes.map(plain), range: [lanes.length - 0.4, -0.6],
        zeroline: false, ticksuffix: " ", fixedrange: true,
      },
      margin: { l: 70, r: 14, t: 8, b: 42 },
    })];
  }

  const axisOfEvent = () => (state.axis === "s" ? "step" : state.axis);

  function drawTasks(chart) {
    const tasks = data.tasks;
    const visible = runs.map((_, index) => index).filter(shown);
    const traces = visible.map((index, place) => {
      const found = tasks.map((task) => runs[index].tasks[task] || null);
      const offset = visible.length > 1 ? 0.5 * (place / (visible.length - 1) - 0.5) : 0;
      return {
        type: "scatter", mode: "markers", name: plain(runs[index].label),
        x: found.map((figure) => figure && figure.value), y: tasks.map((_, row) => row + offset),
        error_x: { type: "data", array: found.map((figure) => (figure && figure.stderr) || 0), color: colour(index), thickness: 1.6, width: 5 },
        marker: { color: colour(index), size: 9 },
        text: found.map((figure) => figure && figure.stderr !== null ? ` ± ${(100 * figure.stderr).toFixed(2)}` : ""),
        hovertemplate: `%{meta.label}%{x:.2%}%{text}<extra></extra>`,
        meta: { run: index, name: null, label: many ? plain(runs[index].label) + ": " : "" },
      };
    });
    const chances = tasks.map((task) => runs.map((run) => run.tasks[task]).find((figure) => figure && figure.chance !== null));
    traces.push({
      type: "scatter", mode: "markers", name: "guessing", x: chances.map((figure) => figure ? figure.chance : null),
      y: tasks.map((_, row) => row), marker: { symbol: "line-ns-open", size: 16, color: css("--soft"), line: { width: 2 } },
      hovertemplate: "guessing: %{x:.2%}<extra></extra>", meta: { run: null, name: null },
    });
    return [traces, layout(chart, {
      hovermode: "closest", xaxis: { tickformat: ".0%" },
      yaxis: { tickvals: tasks.map((_, row) => row), ticktext: tasks.map(plain), range: [tasks.length - 0.4, -0.6], zeroline: false, ticksuffix: " " },
      margin: { l: 70, r: 14, t: 8, b: 34 },
    })];
  }

  const DRAW = { line: drawLine, heat: drawHeat, memory: drawMemory, shares: drawShares, timeline: drawTimeline, tasks: drawTasks };

  // The buttons are named one by one: by default plotly.js has one that sends the chart to its makers' server.
  const CONFIG = {
    responsive: true, displaylogo: false, scrollZoom: false, doubleClick: false,
    modeBarButtons: [["zoomIn2d", "zoomOut2d"], ["zoom2d", "pan2d"], ["toImage"]],
    showSendToCloud: false, plotlyServerURL: "", toImageButtonOptions: { format: "svg" },
  };

  function heightOf(chart) {
    const visible = Math.max(1, runs.length - state.hidden.size);
    if (chart.kind === "memory") return 60 + 2 * visible * 42;
    if (chart.kind === "shares") return 60 + chart.rows * Math.max(42, 26 * visible);
    if (chart.kind === "tasks") return 60 + chart.rows * Math.max(30, 16 * visible);
    if (chart.kind === "timeline") return 60 + data.lanes.length * Math.max(24, 12 * visible);
    if (chart.kind === "heat") return Math.max(240, Math.min(560, 80 + chart.rows * 16)) + (narrow() ? 50 : 0);
    return null;
  }

  async function draw(chart) {
    const place = document.getElementById(`chart-${chart.id}`);
    const [traces, arrangement] = DRAW[chart.kind](chart);
    const height = heightOf(chart);
    if (height) place.style.height = `${height}px`;
    if (!traces.length) arrangement.annotations = [nothing("no run is shown")];
    await Plotly.react(place, traces, arrangement, CONFIG);
    if (!place.dataset.ready) {
      place.dataset.ready = "true";
      place.on("plotly_relayout", (change) => zoomed(chart, change));
      place.on("plotly_doubleclick", () => zoom(null));
      place.addEventListener("keydown", (event) => keyed(place, chart, event));
    }
  }

  const overRun = (chart) => ["line", "heat", "timeline"].includes(chart.kind);
  let busy = Promise.resolve();

  function drawAll(chosen = () => true) {
    busy = busy.then(async () => {
      for (const chart of data.charts) {
        if (!chosen(chart)) continue;
        await draw(chart);
        if (!root.dataset.ready) await new Promise((resolve) => setTimeout(resolve)); // the page stays alive
      }
      root.dataset.ready = "true";
    });
    return busy;
  }

  // A stretch of the run that is chosen in one chart is shown by all that are over the run.
  function zoomed(chart, change) {
    if (!overRun(chart)) return;
    if (change["xaxis.range[0]"] !== undefined) zoom([change["xaxis.range[0]"], change["xaxis.range[1]"]]);
    else if (change["xaxis.range"]) zoom(change["xaxis.range"]);
  }

  function zoom(range) {
    if (JSON.stringify(range) === JSON.stringify(state.range)) return;
    state.range = range;
    drawAll(overRun);
  }

  // Keys of a chart that has the focus: arrows say the values one by one, + and - zoom, 0 shows all.
  function keyed(place, chart, event) {
    const curve = (place.data || []).findIndex((trace) => trace.type === "scatter" && !trace.meta.level && trace.x.length > 1);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step && curve >= 0) {
      const trace = place.data[curve];
      const last = trace.x.length - 1;
      let point = place.dataset.point === undefined ? (step > 0 ? -1 : last + 1) : Number(place.dataset.point);
      do point += step * (event.shiftKey ? 10 : 1);
      while (point > 0 && point < last && trace.y[point] === null);
      point = Math.max(0, Math.min(last, point));
      place.dataset.point = point;
      Plotly.Fx.hover(place, [{ curveNumber: curve, pointNumber: point }]);
      const x = Number(trace.x[point]).toLocaleString("en");
      const y = trace.text && chart.kind !== "line" ? trace.text[point] : `${trace.name} ${Number(trace.y[point]).toPrecision(5)}`;
      document.getElementById("spoken").textContent = `${x} ${AXES[state.axis]}: ${y}`;
    } else if (overRun(chart) && (event.key === "+" || event.key === "-" || event.key === "=")) {
      const [low, high] = place._fullLayout.xaxis.range;
      const trace = curve >= 0 && place.dataset.point !== undefined ? place.data[curve].x[Number(place.dataset.point)] : null;
      const at = trace === null ? (low + high) / 2 : state.logX ? Math.log10(trace) : trace;
      const half = ((high - low) / 2) * (event.key === "-" ? 2 : 0.5);
      zoom([at - half, at + half]);
    } else if (event.key === "0") {
      zoom(null);
    } else if (event.key === "Escape") {
      Plotly.Fx.unhover(place);
      delete place.dataset.point;
    } else return;
    event.preventDefault();
  }

  // Switches

  function on(id, event, act) {
    const element = document.getElementById(id);
    if (element) element.addEventListener(event, act);
  }

  for (const input of document.querySelectorAll('input[name="axis"]')) {
    if (!input.disabled && input.defaultChecked) state.axis = input.value;
    input.addEventListener("change", () => {
      state.axis = input.value;
      state.range = null;
      for (const place of document.querySelectorAll(".chart")) delete place.dataset.point;
      drawAll(overRun);
    });
  }
  for (const input of document.querySelectorAll('input[name="theme"]'))
    input.addEventListener("change", () => {
      if (input.value === "auto") delete root.dataset.theme;
      else root.dataset.theme = input.value;
      repaint();
    });
  for (const [name, key] of [["x-scale", "logX"], ["y-scale", "logY"]])
    for (const input of document.querySelectorAll(`input[name="${name}"]`))
      input.addEventListener("change", () => {
        state[key] = input.value === "log";
        if (key === "logX") state.range = null;
        drawAll(overRun);
      });
  on("whole", "click", () => {
    state.range = null;
    drawAll(overRun);
  });
  for (const button of document.querySelectorAll(".runs button"))
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      const hide = shown(run);
      if (hide) state.hidden.add(run);
      else state.hidden.delete(run);
      button.setAttribute("aria-pressed", String(!hide));
      drawAll();
    });
  on("heat-run", "change", (event) => {
    state.heatRun = Number(event.target.value);
    drawAll((chart) => chart.kind === "heat");
  });
  on("heat-part", "change", (event) => {
    state.heatPart = event.target.value;
    drawAll((chart) => chart.kind === "heat");
  });
  const heat = document.getElementById("heat-run");
  if (heat) state.heatRun = Number(heat.value);

  // Samples: one step at a time

  const steps = [...document.querySelectorAll(".sample-step")];
  const slider = document.getElementById("sample-slider");
  function showSample(place) {
    const at = Math.max(0, Math.min(steps.length - 1, place));
    steps.forEach((section, index) => section.classList.toggle("hidden", index !== at));
    slider.value = at;
    slider.setAttribute("aria-valuetext", steps[at].dataset.label);
  }
  if (slider && steps.length) {
    document.getElementById("sample-row").classList.remove("hidden");
    slider.max = steps.length - 1;
    slider.addEventListener("input", () => showSample(Number(slider.value)));
    on("sample-before", "click", () => showSample(Number(slider.value) - 1));
    on("sample-after", "click", () => showSample(Number(slider.value) + 1));
    showSample(steps.length - 1);
  }

  // Colours: of the legend and of the charts

  function repaint() {
    for (const line of document.querySelectorAll("svg[data-run] line")) {
      const run = Number(line.parentNode.dataset.run);
      line.style.stroke = colour(run);
      line.style.strokeDasharray = { solid: "none", dash: "6 4", dot: "2 3", dashdot: "7 3 2 3" }[dash(run)];
    }
    return drawAll();
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => { if (!printing.now) repaint(); });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    const crossed = (width < 560) !== narrow();
    width = window.innerWidth;
    if (crossed) drawAll();
  });
  let before;
  window.addEventListener("beforeprint", () => { // ink on paper, at the width of a page
    printing.now = true;
    before = root.dataset.theme;
    root.dataset.theme = "light";
    for (const chart of data.charts) {
      const place = document.getElementById(`chart-${chart.id}`);
      const [traces, arrangement] = DRAW[chart.kind](chart);
      Plotly.react(place, traces, { ...arrangement, autosize: false, width: 660, height: place.clientHeight }, CONFIG);
    }
  });
  window.addEventListener("afterprint", () => {
    printing.now = false;
    if (before === undefined) delete root.dataset.theme;
    else root.dataset.theme = before;
    repaint();
  });
  window.alborReport = { drawn: () => busy.then(() => busy) }; // resolves when all that was asked for is drawn
  repaint();
})();
