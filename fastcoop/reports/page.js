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
const wording = tips => (point, sanitize) => "<table>" + Object.entries(tips).map(([field, title]) =>
  `<tr><td class="key">${sanitize(title)}</td><td>${sanitize(point[field])}</td></tr>`).join("") + "</table>";
const draw = async box => {
  const {spec, panels, tips} = charts[box.dataset.chart], panel = panels[box.dataset.panel];
  views.get(box)?.finalize();
  const height = Number(box.dataset.height), data = {values: panel.points};
  const tooltip = {disableDefaultStyle: true, formatTooltip: wording(tips)};
  const {view} = await vegaEmbed(box, {...spec, height, data, description: panel.title}, {...OPTIONS, tooltip});
  views.set(box, view);
  if (hidden.size) await view.signal("hidden", [...hidden]).runAsync();
};
const whenSeen = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) if (isIntersecting) { whenSeen.unobserve(target); draw(target); }
}, {rootMargin: "300px"});
const observe = place => all(".panels .chart", place).forEach(box => whenSeen.observe(box));
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
  const text = cell.textContent.trim();
  if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
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
  link.href = image.src;
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
