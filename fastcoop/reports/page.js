"use strict";
const root = document.documentElement;
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const charts = JSON.parse(document.getElementById("charts").textContent);
const hidden = new Set(); // methods that no chart shows
const views = new Map(); // by the element that a chart is drawn in

const unpack = text => {
  const bytes = Uint8Array.from(atob(text.trim()), char => char.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};

// Charts: drawn when they come into view, in colors that follow the page's.
const AXIS = {labelColor: "var(--soft)", titleColor: "var(--soft)", gridColor: "var(--rule)", domainColor: "var(--rule)",
  tickColor: "var(--rule)", titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11, gridOpacity: .7};
const CONFIG = {background: "transparent", font: "system-ui, sans-serif", view: {stroke: null}, axis: AXIS};
const OPTIONS = {renderer: "svg", actions: false, ast: true, logLevel: 1, config: CONFIG};
const POINT = {content: "data"}; // a tooltip of all values, which `wording` words
const INK = "var(--ink)";
const MANY = 8; // methods, above which bands of deviation are faint and panels higher
const looked = (looks, field) => ({field: "method", type: "nominal", legend: null,
  scale: {domain: looks.map(one => one.name), range: looks.map(one => one[field])}});
const amount = (title, field = "mean", zero = false) => ({field, type: "quantitative", title, scale: {zero}});
// A layer of the points that meet a condition; screen readers get those of the layer that has the tooltips.
const layer = (mark, encoding, only = "true") => ({mark: {...mark, aria: false}, encoding, transform: [{filter: only}]});
const spread = (axis, title, only, zero) => layer({type: "rule"},
  {[axis]: amount(title, "low", zero), [`${axis}2`]: {field: "high"}}, only);
const markers = (looks, size) => ({ // the one nearest to the pointer is large and has the tooltip
  mark: {type: "point", strokeWidth: 1.3, opacity: 1, tooltip: POINT},
  params: [{name: "near", select: {type: "point", on: "pointermove", clear: "pointerout", nearest: true}}],
  encoding: {shape: looked(looks, "marker"), fill: looked(looks, "fill"), size: {condition: {param: "near", empty: false, value: 110}, value: size}},
});
const KINDS = { // how each kind of chart is drawn, with the height of its panels and the titles of its tooltips
  lines: {
    height: ({looks}) => looks.length > MANY ? 260 : 190,
    spec: ({looks, ticks, xlabel, ylabel, panels}) => ({
      encoding: {color: looked(looks, "color"), y: amount(ylabel),
        x: {field: "x", type: "ordinal", title: xlabel, scale: {domain: ticks}, axis: {labelAngle: 0, grid: false}}},
      layer: [
        layer({type: "area", opacity: looks.length > MANY ? .05 : .15},
          {y: amount(ylabel, "low"), y2: {field: "high"}}, "!datum.alone"),
        layer({type: "rule", strokeWidth: 1, strokeDash: [1, 3]}, {x: null}, "datum.level"),
        layer({type: "line", strokeWidth: 2}, {strokeDash: looked(looks, "dash")}, "!datum.alone"),
        ...panels.some(({points}) => points.some(one => one.alone && !one.level))
          ? [spread("y", ylabel, "datum.alone && !datum.level")] : [],
        markers(looks, 36)],
    }),
  },
  bars: {
    height: (_, {points}) => 34 * (points.length + 1),
    spec: ({looks, xlabel}) => {
      const deviation = spread("x", xlabel, "true", true);
      Object.assign(deviation.mark, {yOffset: 8, color: INK});
      deviation.encoding.color = null;
      const text = {type: "text", align: "left", dy: -5, x: 2, color: INK, limit: {expr: "width"}, tooltip: POINT};
      return {
        encoding: {color: looked(looks, "color"), y: {field: "label", type: "nominal", sort: null, axis: null},
          x: {...amount(xlabel, "mean", true), axis: {tickCount: 8, grid: false}}},
        layer: [{mark: {type: "bar", height: 11, yOffset: 8, opacity: .85, tooltip: POINT}}, deviation,
          {mark: text, encoding: {text: {field: "label"}, x: null, color: null}}],
      };
    },
  },
  marks: {
    height: () => 260,
    spec: ({looks, xlabel, ylabel}) => ({
      encoding: {color: looked(looks, "color"), y: amount(ylabel),
        x: {field: "x", type: "quantitative", title: xlabel, scale: {type: "log"},
          axis: {grid: false, format: "~g", labelOverlap: true, labelSeparation: 8}}},
      layer: [spread("y", ylabel), markers(looks, 80)],
    }),
  },
  confusions: {
    height: ({ticks}) => 19 * ticks.length,
    tips: {y: "true class", x: "predicted", images: "images", shown: "of the true class"},
    spec: ({ticks, xlabel, ylabel}) => {
      const axis = labelAngle => ({domain: false, ticks: false, labelAngle, labelLimit: 110, labelFontSize: 10});
      const names = (field, title, angle) => ({field, type: "nominal", title, axis: axis(angle), scale: {domain: ticks}});
      return {
        encoding: {x: names("x", xlabel, -90), y: names("y", ylabel, 0)},
        layer: [
          layer({type: "rect", tooltip: POINT}, {color: {field: "color", type: "nominal", scale: null},
            opacity: {field: "strength", type: "quantitative", scale: null}}),
          {mark: {type: "text", fontSize: 10, color: INK, tooltip: POINT}, encoding: {text: {field: "images"}}}],
      };
    },
  },
  calibration: {
    height: () => 260,
    tips: {bin: "confidence", shown: "accuracy", images: "images", share: "of all images (%)"},
    spec: ({xlabel, ylabel}) => {
      const color = "light-dark(#0072b2, #6bafd2)", some = "datum.images > 0";
      const percent = (field, title) => ({field, title, type: "quantitative", scale: {domain: [0, 100]},
        axis: {grid: false, values: [0, 20, 40, 60, 80, 100]}});
      return {
        encoding: {x: percent("x", xlabel), y: percent("y", ylabel)},
        layer: [
          layer({type: "rect", color: "var(--rule)", stroke: "var(--paper)"},
            {x: percent("low", xlabel), x2: {field: "high"}, y: percent("share", ylabel), y2: {datum: 0}}),
          layer({type: "rule", color: "var(--soft)", strokeDash: [6, 3]},
            {x: {datum: 0}, y: {datum: 0}, x2: {datum: 100}, y2: {datum: 100}}),
          layer({type: "line", color, strokeWidth: 2}, {}, some),
          {mark: {type: "point", filled: true, opacity: 1, size: 45, color, tooltip: POINT}, transform: [{filter: some}]}],
      };
    },
  },
};
const wording = tips => (point, sanitize) => "<table>" + Object.entries(tips).map(([field, title]) =>
  `<tr><td class="key">${sanitize(title)}</td><td>${sanitize(point[field])}</td></tr>`).join("") + "</table>";
const draw = async box => {
  const chart = charts[box.dataset.chart], panel = chart.panels[box.dataset.panel], kind = KINDS[chart.kind];
  views.get(box)?.finalize();
  const tips = kind.tips ?? {method: "method", x: chart.xlabel, shown: "mean ± deviation", seeds: "seeds", runs: "runs"};
  const tooltip = {disableDefaultStyle: true, formatTooltip: wording(tips)};
  const {view} = await vegaEmbed(box, {
    width: "container", height: box.closest(".top") ? 350 : kind.height(chart, panel), description: panel.title,
    data: {values: panel.points}, params: [{name: "hidden", value: []}],
    transform: [{filter: "indexof(hidden, datum.method) < 0"}], ...kind.spec(chart),
  }, {...OPTIONS, tooltip});
  views.set(box, view);
  if (hidden.size) await view.signal("hidden", [...hidden]).runAsync();
};
const whenSeen = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) if (isIntersecting) { whenSeen.unobserve(target); draw(target); }
}, {rootMargin: "300px"});
const observe = place => all(".panels .chart", place).forEach(box => {
  const chart = charts[box.dataset.chart];
  box.style.minHeight = `${KINDS[chart.kind].height(chart, chart.panels[box.dataset.panel]) + 40}px`;
  whenSeen.observe(box);
});
const showCharts = async () => {
  if (!Object.keys(charts).length) return;
  const script = document.createElement("script");
  script.textContent = await unpack(document.getElementById("library").textContent);
  document.body.append(script);
  root.classList.add("live");
  observe(document);
  if (chosen) showChosen();
};

// The legend hides a method in every chart.
all(".legend button").forEach(button => button.addEventListener("click", () => {
  const method = button.dataset.method;
  hidden.delete(method) || hidden.add(method);
  all(".legend button").forEach(one => one.setAttribute("aria-pressed", !hidden.has(one.dataset.method)));
  views.forEach(view => view.signal("hidden", [...hidden]).runAsync());
}));

// The first screen shows the chosen panel and its best methods.
const chosen = document.getElementById("chosen");
const showChosen = () => {
  const [chart, panel] = chosen.value.split("|"), {title, notes} = charts[chart].panels[panel];
  const care = [...charts[chart].notes, ...notes];
  const box = document.querySelector(".top .chart");
  Object.assign(box.dataset, {chart, panel});
  document.querySelector(".top .care").textContent = care.join("; ");
  all(".top [data-of]").forEach(one => { one.hidden = one.dataset.of !== chart; });
  all(`.best[data-of="${chart}"] tbody tr`).forEach(row => { row.hidden = row.cells[0].textContent !== title; });
  draw(box);
};
chosen?.addEventListener("change", showChosen);

// Tables: a click on a head sorts, numbers by value, the rest as text, empty cells last; long ones have a filter.
const valueOf = cell => {
  const text = cell.textContent.trim().replace(/^([-+]?[\d.]+) (±|to) .*/, "$1"); // the mean, the fewest runs
  return text === "" || text === "–" ? null : isNaN(text) ? text : Number(text);
};
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
const prepare = table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [valueOf(row.cells[column]), row]);
    rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : up ? compare(a, b) : compare(b, a));
    body.append(...rows.map(([, row]) => row));
  }));
  if (body.rows.length <= 12 || table.closest(".best")) return;
  const label = document.createElement("label"), input = document.createElement("input");
  input.type = "search";
  label.className = "filter";
  label.append("Rows with ", input);
  table.parentElement.before(label);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(" ");
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
};

// A figure as SVG is the picture that is printed; the PNG is drawn from it.
const linkImage = link => {
  const image = document.getElementById(link.dataset.image);
  const follow = () => { link.href = image.src; };
  image.hasAttribute("src") ? follow() : image.addEventListener("load", follow, {once: true});
  if (link.download.endsWith(".png")) link.addEventListener("click", () => {
    const canvas = document.createElement("canvas"), scale = 3;
    [canvas.width, canvas.height] = [scale * image.naturalWidth, scale * image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    link.href = canvas.toDataURL();
  });
};

// What is packed is unpacked when its fold is first opened.
const begin = place => {
  all("table", place).forEach(prepare);
  all("[data-image]", place).forEach(linkImage);
  all("[data-packed-image]", place).forEach(async image => {
    image.src = `data:image/svg+xml,${encodeURIComponent(await unpack(image.dataset.packedImage))}`;
  });
  all("[data-packed-file]", place).forEach(async link => {
    link.href = URL.createObjectURL(new Blob([await unpack(link.dataset.packedFile)]));
  });
  all("script[data-packed]", place).forEach(packed => packed.closest("details").addEventListener("toggle", async () => {
    const inside = document.createElement("div");
    inside.innerHTML = await unpack(packed.textContent);
    packed.replaceWith(inside);
    begin(inside);
    observe(inside);
  }, {once: true}));
};
begin(document);

document.getElementById("theme").addEventListener("click", () => {
  const isDark = (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.style.colorScheme = isDark ? "light" : "dark";
});
showCharts();
