/** How unlike the reference devices and sites are: by feature now, and over time. */
import { html, useState } from "./dom.js";
import { ago, count, moment, plural, words } from "./format.js";
import { useNow } from "./live.js";
import { Empty, Panel } from "./marks.js";

const VIEWS = [["devices", "Devices"], ["sites", "Sites"]];
const STEPS = [0.5, 1.3, 2, 3, 5]; // evidence, -log10 p: from here on a cell is one shade stronger
const LEVELS = ["as usual", "barely", "somewhat", "clearly", "strongly", "extremely"];

const level = (evidence) => STEPS.filter((step) => evidence >= step).length;

const said = (evidence) => (evidence == null ? "not judged"
  : `${LEVELS[level(evidence)]} unlike the reference, evidence ${evidence.toFixed(1)}`);

const Cell = ({ evidence, label }) => html`<span role="cell" class=${evidence == null
  ? "cell none" : `cell heat-${level(evidence)}`} title="${label}: ${said(evidence)}"
  aria-label="${label}: ${said(evidence)}"></span>`;

const columns = (number) => ({ gridTemplateColumns: `var(--names) repeat(${number}, minmax(0, 1fr))` });

/** Rows of one feature each, columns of time. */
function History({ row, features, at }) {
  const { points } = row;
  return html`<div class="history">
    <p class="lead">${row.name}: ${plural(points.length, "judgement")} since${" "}
      <time title=${moment(points[0][0])}>${ago(points[0][0], at)}</time>, newest on the right</p>
    <div class="heat" role="table" aria-label="${row.name} over time">
      ${features.map((feature, i) => html`<div role="row" class="line" key=${feature} style=${columns(points.length)}>
        <span role="rowheader" class="name" title=${feature}>${words(feature)}</span>
        ${points.map(([time, values]) => html`<${Cell} key=${time} evidence=${values[i]}
          label="${words(feature)}, ${moment(time)}" />`)}</div>`)}
    </div>
  </div>`;
}

const Key = () => html`<span class="scale"><span>as usual</span>
  ${LEVELS.map((name, i) => html`<i key=${name} class="cell heat-${i}" title=${name}></i>`)}<span>unlike</span></span>`;

export function Drift({ data }) {
  const at = useNow();
  const [view, setView] = useState("devices");
  const [chosen, setChosen] = useState(null);
  const { features, looked, more } = data.drift;
  const rows = data.drift[view];
  const row = rows.find(({ name }) => name === chosen);
  const note = looked === 0 ? "" : html`<${Key} />`;
  return html`<${Panel} id="drift" title="Drift by feature" note=${note} className="wide">
    <div class="tools"><div class="segments" role="group" aria-label="Rows">
      ${VIEWS.map(([name, label]) => html`<button type="button" key=${name} aria-pressed=${view === name}
        onClick=${() => { setView(name); setChosen(null); }}>
        ${label}<small>${count(data.drift[name].length)}</small></button>`)}
    </div></div>
    ${rows.length === 0 && html`<${Empty} title=${view === "sites" ? "No device has said where it stands" : "No device was judged yet"}>
      ${view === "sites" ? html`Set <code>site</code> in the agents’ configuration.`
        : "A device is judged once it has sent a few telemetry windows."}<//>`}
    ${rows.length > 0 && html`<div class="heat" role="table" aria-label="Drift by feature, now">
      <div role="row" class="line heads" style=${columns(features.length)}>
        <span role="columnheader" class="name">${view === "sites" ? "Site" : "Device"}</span>
        ${features.map((feature) => html`<span role="columnheader" class="head-cell" key=${feature}
          title=${feature}>${words(feature)}</span>`)}
      </div>
      ${rows.map((each) => html`<div role="row" class="line" key=${each.name} style=${columns(features.length)}>
        <span role="rowheader" class="name"><button type="button" aria-expanded=${chosen === each.name}
          title="Show ${each.name} over time" onClick=${() => setChosen(chosen === each.name ? null : each.name)}>
          ${each.name}</button>${view === "sites" && html`<small>${count(each.devices)}</small>`}</span>
        ${features.map((feature, i) => html`<${Cell} key=${feature} evidence=${each.now[i]}
          label="${each.name}, ${words(feature)}" />`)}</div>`)}
    </div>`}
    ${row && html`<${History} row=${row} features=${features} at=${at} />`}
    ${rows.length > 0 && html`<p class="lead foot-note">The most unlike of ${plural(looked, "judged device")}.
      ${more > 0 ? ` ${plural(more, "feature")} more ${more === 1 ? "is" : "are"} not drawn.` : ""} All of it:${" "}
      <code>shoal drift show</code></p>`}
  <//>`;
}
