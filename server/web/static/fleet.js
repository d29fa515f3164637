/** The fleet as a table: what each device is, runs, and how well. */
import { html, useEffect, useMemo, useRef, useState } from "./dom.js";
import { UNKNOWN, ago, count, model, moment, percent, plural, sentence, short } from "./format.js";
import { useNow } from "./live.js";
import { Badge, Empty, Panel, Spark } from "./marks.js";

const ROLLOUT_TONES = {
  confirmed: "ok", trial: "run", downloading: "run", offered: "run",
  eligible: "idle", superseded: "idle", failed: "bad", silent: "warn",
  reverting: "warn", reverted: "idle",
};

/** Whether a device's windows lack something: its silence is no health. */
const lacking = (device) => Boolean(device.untold?.text);

const COLUMNS = [
  { key: "id", name: "Device", by: (d) => d.id },
  { key: "state", name: "State", by: (d) => (d.revoked ? 2 : d.online ? 0 : 1) },
  { key: "model", name: "Model", by: (d) => model(d.model) },
  { key: "accuracy", name: "Accuracy", by: (d) => d.accuracy?.value ?? 2 },
  { key: "drift", name: "Drift", by: (d) => (d.drift == null ? 2 : d.drift.drifting ? 0 : 1) },
  { key: "rollout", name: "Rollout", by: (d) => d.rollout?.state ?? "~" },
  { key: "seen", name: "Last seen", by: (d) => -(d.seen_ms ?? 0) },
];

const FILTERS = [
  ["all", "All", () => true],
  ["drifting", "Drifting", (d) => d.drift?.drifting],
  ["silent", "Silent", (d) => !d.online],
  ["failed", "Failed", (d) => d.rollout?.state === "failed"],
  ["warned", "Warned", (d) => d.warnings.length > 0 || lacking(d)],
];

function State({ device }) {
  if (device.revoked) return html`<${Badge} tone="bad">Revoked<//>`;
  if (device.online) return html`<${Badge} tone="ok">Online<//>`;
  return device.seen_ms == null
    ? html`<${Badge} tone="idle">Never seen<//>` : html`<${Badge} tone="warn">Silent<//>`;
}

function Drift({ drift, untold }) {
  if (drift == null) return html`<span class="faint" title="too few windows to say">${UNKNOWN}</span>`;
  if (!drift.drifting) return html`<${Badge} tone=${untold?.text ? "idle" : "ok"} title=${untold?.text}>
    ${untold?.text ? "Steady in part" : "Steady"}<//>`;
  return html`<div class="drift" title=${drift.text}><${Badge} tone="warn">Drifting<//>
    <span class="features">${drift.features.join(", ")}</span></div>`;
}

function Accuracy({ device, low }) {
  const { accuracy, trend } = device;
  if (accuracy?.value == null) return html`<span class="faint" title="no labels yet">${UNKNOWN}</span>`;
  return html`<div class="score" title="${count(accuracy.correct)} of the last ${count(accuracy.labelled)} labelled windows">
    <span class="number">${percent(accuracy.value)}</span>
    <${Spark} values=${trend} low=${low} tone=${device.drift?.drifting ? "warn" : ""} /></div>`;
}

/** What a device warns of and does not tell, in its own words, and what to do about it. */
function Told({ device, at }) {
  return html`<tr class="told"><td colspan=${COLUMNS.length}><dl class="facts">
    ${device.warnings.map((each, i) => html`<div key=${i}>
      <dt><${Badge} tone=${each.severity === "error" ? "bad" : "warn"}>${each.code}<//></dt>
      <dd><span>${each.text}</span>${each.fix && html`<span class="fix">To mend: ${each.fix}</span>`}</dd></div>`)}
    ${lacking(device) && html`<div><dt>Not told</dt><dd>${device.untold.text}</dd></div>`}
    <div><dt>Reported</dt><dd><time title=${moment(device.reported_ms)}>${ago(device.reported_ms, at)}</time></dd></div>
  </dl></td></tr>`;
}

function Row({ device, low, at, focused, pinned, open, onHover, onPin, onOpen }) {
  const { id, rollout, warnings } = device;
  const marked = warnings.length > 0 || lacking(device);
  return html`<tr class=${focused ? "focused" : ""} onMouseEnter=${() => onHover(id)}
      onMouseLeave=${() => onHover(null)}>
    <th scope="row"><button type="button" class="device" aria-pressed=${pinned}
      title="Highlight ${id} in the chart"
      onClick=${() => onPin(id)} onFocus=${() => onHover(id)} onBlur=${() => onHover(null)}>${id}</button></th>
    <td data-name="State"><${State} device=${device} />${marked && html`
      <button type="button" class="mark" aria-expanded=${open} title="What ${id} says of itself"
        onClick=${() => onOpen(open ? null : id)}>${warnings.length > 0
          ? plural(warnings.length, "warning") : "Tells less"}</button>`}</td>
    <td data-name="Model" class="model" title=${model(device.model)}>${device.model
      ? html`<span>${model(device.model)}</span><code title=${device.model.sha256}>${short(device.model.sha256)}</code>`
      : html`<span class="faint" title="the device has not said">unknown</span>`}</td>
    <td data-name="Accuracy"><${Accuracy} device=${device} low=${low} /></td>
    <td data-name="Drift"><${Drift} drift=${device.drift} untold=${device.untold} /></td>
    <td data-name="Rollout">${rollout
      ? html`<${Badge} tone=${ROLLOUT_TONES[rollout.state]} title=${rollout.reason}>
          ${rollout.state === "eligible" ? "Waiting" : sentence(rollout.state)}<//>
        <span class="version faint">${rollout.version ? `v${rollout.version}` : ""}</span>`
      : html`<span class="faint">${UNKNOWN}</span>`}</td>
    <td data-name="Last seen" class="seen"><time title=${moment(device.seen_ms)}>${ago(device.seen_ms, at)}</time></td>
  </tr>${open && marked && html`<${Told} device=${device} at=${at} />`}`;
}

export function Fleet({ data, focus, pinned, onHover, onPin }) {
  const at = useNow();
  const [sort, setSort] = useState({ key: "id", down: false });
  const [filter, setFilter] = useState("all");
  const [words, setWords] = useState("");
  const [opened, setOpened] = useState(null);
  const search = useRef(null);
  useEffect(() => {
    const jump = (event) => {
      if (event.key !== "/" || event.target.matches("input, textarea")) return;
      event.preventDefault();
      search.current?.focus();
    };
    addEventListener("keydown", jump);
    return () => removeEventListener("keydown", jump);
  }, []);

  const devices = data.fleet.devices;
  const rows = useMemo(() => {
    const wanted = words.trim().toLowerCase();
    const keep = FILTERS.find(([name]) => name === filter)[2];
    const { by } = COLUMNS.find(({ key }) => key === sort.key);
    const order = (a, b) => {
      const [x, y] = [by(a), by(b)];
      const found = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return found || a.id.localeCompare(b.id, "en", { numeric: true });
    };
    const found = devices.filter((d) => keep(d) && (!wanted
      || `${d.id} ${model(d.model)} ${d.drift?.features.join(" ") ?? ""} ${d.warnings.map((each) => each.code).join(" ")}`
        .toLowerCase().includes(wanted)));
    found.sort(order);
    return sort.down ? found.reverse() : found;
  }, [devices, words, filter, sort]);

  // One scale for all sparklines, so that they compare down the column.
  const low = useMemo(() => Math.min(0.9, ...devices.flatMap(({ trend }) => trend).filter((share) => share != null)),
    [devices]);
  const total = data.fleet.total;
  const note = devices.length < total
    ? `${count(rows.length)} of ${count(devices.length)} shown; the fleet has ${count(total)}`
    : rows.length < total ? `${count(rows.length)} of ${count(total)}` : plural(total, "device");
  return html`<${Panel} id="fleet" title="Fleet" note=${note} className="wide">
    <div class="tools">
      <input ref=${search} type="search" placeholder="Filter by device, model, feature  ( / )"
        aria-label="Filter devices" value=${words} onInput=${(event) => setWords(event.target.value)} />
      <div class="segments" role="group" aria-label="Show">
        ${FILTERS.map(([name, label, keep]) => html`<button type="button" key=${name}
          aria-pressed=${filter === name} onClick=${() => setFilter(name)}>
          ${label}<small>${count(devices.filter(keep).length)}</small></button>`)}
      </div>
    </div>
    <table>
      <thead><tr>${COLUMNS.map(({ key, name }) => html`
        <th key=${key} scope="col"
            aria-sort=${sort.key !== key ? "none" : sort.down ? "descending" : "ascending"}>
          <button type="button" onClick=${() => setSort({ key, down: sort.key === key && !sort.down })}>
            ${name}<i aria-hidden="true">${sort.key !== key ? "" : sort.down ? "↓" : "↑"}</i></button>
        </th>`)}</tr></thead>
      <tbody>${rows.map((device) => html`<${Row} key=${device.id} device=${device} low=${low} at=${at}
        focused=${focus === device.id} pinned=${pinned === device.id} onHover=${onHover} onPin=${onPin}
        open=${opened === device.id} onOpen=${setOpened} />`)}</tbody>
    </table>
    ${devices.length === 0 && html`<${Empty} title="No device has enrolled">
      <code>shoal devices token NAME</code> prints a token; <code>shoal-agent enroll</code> uses it.<//>`}
    ${devices.length > 0 && rows.length === 0 && html`<${Empty} title="No device matches">
      Clear the filter to see all ${count(devices.length)}.<//>`}
  <//>`;
}
