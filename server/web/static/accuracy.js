/**
 * Accuracy over time: a thin line for each device, a bold one for the fleet's median, a mark where
 * each wave of a rollout began.
 *
 * The canvas is drawn by ECharts. Its tooltip is an element of ours: markup with style attributes
 * would break the page's policy, and a device's name must never become markup.
 */
import * as echarts from "./vendor/echarts.mjs";
import { html, useEffect, useMemo, useRef } from "./dom.js";
import { clock, count, duration, model, percent, plural } from "./format.js";
import { Empty, Panel } from "./marks.js";

const LINES_MAX = 60; // more lines than this is a carpet; drifting devices are drawn first
const MEDIAN = "fleet median";
const TOOLTIP_ROWS = 5;
const LEFT = 48; // px beside the plot, for the scale
const RIGHT = 14;

const token = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The names of the devices that are drawn: drifting first, then by name. */
function chosen(data) {
  const drifting = new Set(data.summary.drifting);
  return data.accuracy.devices
    .map((line) => ({ ...line, drifting: drifting.has(line.id) }))
    .sort((a, b) => b.drifting - a.drifting)
    .slice(0, LINES_MAX)
    .reverse(); // drifting ones are drawn last, on top
}

/** A tooltip: the time, the median, and the devices furthest below it. */
function tip(params, focus) {
  const box = document.createElement("div");
  box.className = "tip";
  const row = (label, value, kind) => {
    const line = box.appendChild(document.createElement("div"));
    line.className = kind;
    line.appendChild(document.createElement("span")).textContent = label;
    line.appendChild(document.createElement("b")).textContent = value;
  };
  const found = params.filter((each) => each.value?.[1] != null);
  row(clock(params[0].axisValue), "", "time");
  const median = found.find((each) => each.seriesName === MEDIAN);
  if (median) row(MEDIAN, percent(median.value[1]), "median");
  const devices = found.filter((each) => each.seriesName !== MEDIAN);
  devices.sort((a, b) => (b.seriesName === focus) - (a.seriesName === focus) || a.value[1] - b.value[1]);
  for (const each of devices.slice(0, TOOLTIP_ROWS)) {
    const kind = each.seriesName === focus ? "focus" : each.seriesId.startsWith("!") ? "drifting" : "device";
    row(each.seriesName, `${percent(each.value[1])}  of ${count(each.value[2])}`, kind);
  }
  if (devices.length > TOOLTIP_ROWS) row(`${devices.length - TOOLTIP_ROWS} more above these`, "", "rest");
  return box;
}

function floor(data) {
  const shares = data.accuracy.devices.flatMap((line) => line.points.map((point) => point[1]));
  const low = Math.min(1, ...shares.filter((share) => share != null));
  return Math.max(0, Math.min(0.9, Math.floor(low * 10) / 10));
}

/** Where each wave began, oldest first. */
function waves(data) {
  const { since_ms, until_ms } = data.accuracy;
  return data.rollouts
    .flatMap((rollout) => rollout.waves.map(({ began_ms: at }, i) => ({ at, wave: i + 1, rollout })))
    .filter(({ at }) => at != null && at >= since_ms && at <= until_ms)
    .sort((a, b) => a.at - b.at);
}

/** Vertical lines at the waves; a name that would run into the one before it is left out. */
function marks(data, width) {
  const { since_ms, until_ms } = data.accuracy;
  const names = new Set(data.rollouts.map(({ name }) => name));
  const place = (at) => ((at - since_ms) / (until_ms - since_ms)) * width;
  let free = -Infinity;
  return waves(data).map(({ at, wave, rollout }) => {
    const name = `${names.size > 1 ? model(rollout) : `v${rollout.version}`} wave ${wave}`;
    const wide = 6 * name.length + 8; // of 11 px text
    const align = place(at) < wide / 2 ? "left" : place(at) > width - wide / 2 ? "right" : "center";
    const left = place(at) - { left: 0, center: wide / 2, right: wide }[align];
    const fits = left >= free;
    if (fits) free = left + wide;
    return { xAxis: at, name, label: { show: fits, align } };
  });
}

function options(data, focus, focused, width) {
  const text = token("muted");
  const line = token("line");
  const { since_ms, until_ms } = data.accuracy;
  const span = until_ms - since_ms;
  const quiet = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const font = { fontFamily: getComputedStyle(document.body).fontFamily, fontSize: 11 };
  const devices = chosen(data).map((each) => ({
    id: `${each.drifting ? "!" : ""}${each.id}`,
    name: each.id,
    type: "line",
    data: each.points,
    encode: { x: 0, y: 1 },
    showSymbol: false,
    triggerLineEvent: true,
    z: each.id === focus ? 6 : each.drifting ? 3 : 2,
    lineStyle: each.id === focus
      ? { width: 2.5, color: token(each.drifting ? "warn" : "text"), opacity: 1 }
      : { width: each.drifting ? 1.5 : 1, color: token(each.drifting ? "warn" : "faint"),
          opacity: focused ? 0.16 : each.drifting ? 0.8 : 0.5 },
    itemStyle: { color: token(each.drifting ? "warn" : "faint") },
  }));
  const median = {
    id: "median",
    name: MEDIAN,
    type: "line",
    data: data.accuracy.median,
    encode: { x: 0, y: 1 },
    showSymbol: data.accuracy.median.length === 1,
    z: 5,
    lineStyle: { width: 2.5, color: token("accent"), opacity: focused ? 0.45 : 1 },
    itemStyle: { color: token("accent") },
    markLine: {
      silent: true,
      symbol: "none",
      animation: false,
      lineStyle: { color: token("mark"), type: [4, 4], width: 1 },
      label: { formatter: "{b}", position: "end", distance: 7, color: token("muted"), ...font },
      data: marks(data, width - LEFT - RIGHT),
    },
  };
  return {
    animation: false,
    animationDurationUpdate: quiet ? 0 : 200,
    aria: { enabled: false },
    textStyle: { ...font, color: text },
    grid: { left: LEFT, right: RIGHT, top: 30, bottom: 26 },
    xAxis: {
      type: "time", min: since_ms, max: until_ms, splitNumber: 6,
      axisLine: { lineStyle: { color: line } },
      axisTick: { show: false },
      axisLabel: { color: text, hideOverlap: true, margin: 10, ...font, formatter: (at) => clock(at, span) },
      splitLine: { show: false },
    },
    yAxis: {
      type: "value", min: floor(data), max: 1,
      axisLabel: { color: text, margin: 10, ...font, formatter: (share) => `${Math.round(100 * share)} %` },
      splitLine: { lineStyle: { color: line, width: 1 } },
    },
    tooltip: {
      trigger: "axis",
      confine: true,
      transitionDuration: 0,
      padding: 0,
      borderWidth: 0,
      backgroundColor: "transparent",
      extraCssText: "box-shadow:none",
      axisPointer: { lineStyle: { color: token("muted"), type: "solid", width: 1, opacity: 0.5 } },
      formatter: (params) => tip(params, focus),
    },
    series: [...devices, median],
  };
}

/** The chart in one sentence, for those who do not see it. */
function told(data) {
  const known = data.accuracy.median.filter((point) => point[1] != null);
  if (known.length === 0) return "No accuracy is known yet.";
  return `The fleet's median accuracy went from ${percent(known[0][1])} to ${percent(known.at(-1)[1])} `
    + `in ${duration(data.accuracy.until_ms - data.accuracy.since_ms)}. `
    + waves(data).map(({ at, wave, rollout }) =>
      `Wave ${wave} of ${model(rollout)} began at ${clock(at)}.`).join(" ");
}

function Chart({ data, focus, onHover, onPin }) {
  const home = useRef(null);
  const chart = useRef(null);
  const calls = useRef({});
  calls.current = { onHover, onPin, data, focus };
  const draw = () => {
    const { data: newest, focus: on } = calls.current;
    const focused = newest.accuracy.devices.some((line) => line.id === on);
    chart.current.setOption(options(newest, on, focused, chart.current.getWidth()), { replaceMerge: ["series"] });
  };
  useEffect(() => {
    chart.current = echarts.init(home.current, null, { renderer: "canvas" });
    chart.current.on("mouseover", "series", (event) =>
      calls.current.onHover(event.seriesName === MEDIAN ? null : event.seriesName));
    chart.current.on("mouseout", "series", () => calls.current.onHover(null));
    chart.current.on("click", "series", (event) => {
      if (event.seriesName !== MEDIAN) calls.current.onPin(event.seriesName);
    });
    const size = new ResizeObserver(() => { chart.current.resize(); draw(); });
    size.observe(home.current);
    addEventListener("shoal:theme", draw);
    return () => {
      removeEventListener("shoal:theme", draw);
      size.disconnect();
      chart.current.dispose();
    };
  }, []);
  useEffect(draw, [data.accuracy, data.rollouts, data.summary, focus]);
  return html`<div class="chart" ref=${home} role="img" aria-label=${told(data)}></div>`;
}

export function Accuracy({ data, focus, onHover, onPin }) {
  const known = useMemo(() => data.accuracy.median.some((point) => point[1] != null), [data]);
  const drawn = Math.min(LINES_MAX, data.accuracy.devices.length);
  const note = known && html`
    <span class="key median">fleet median</span>
    ${data.summary.drifting.length > 0 && html`<span class="key drifting">drifting</span>`}
    <span class="key single">${drawn < data.accuracy.devices.length
      ? `${drawn} of ${plural(data.accuracy.devices.length, "device")}` : "one device"}</span>`;
  return html`<${Panel} id="accuracy" title="Accuracy" note=${note} className="wide">
    <p class="lead">${known
      ? `Share of labelled windows answered correctly, in steps of ${duration(data.accuracy.bucket_ms)}`
      : "Share of labelled windows answered correctly"}</p>
    <div class="plot">${known
      ? html`<${Chart} data=${data} focus=${focus} onHover=${onHover} onPin=${onPin} />`
      : html`<${Empty} title="No accuracy is known yet">
          It is counted from labels, which devices send some time after their answers.<//>`}</div>
  <//>`;
}
