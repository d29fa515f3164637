/** Alerts as the server words them, live ones first. The page changes nothing: the command does. */
import { html, useState } from "./dom.js";
import { ago, count, moment, plural, sentence, words } from "./format.js";
import { useNow } from "./live.js";
import { Badge, Empty, Panel } from "./marks.js";

const SHOWN = 6;
const TONES = { acknowledged: "run", silenced: "idle", resolved: "ok" };

const SCOPES = { device: "", site: "Site", hardware: "Hardware class", fleet: "" };

function State({ alert }) {
  const kind = `${sentence(alert.kind)}${alert.suspected ? " (suspected)" : ""}`;
  return html`<${Badge} tone=${TONES[alert.state] ?? alert.tone}>${kind}${alert.state === "open"
    ? "" : ` · ${alert.state}`}<//>`;
}

const chance = (value) => (value < 1e-9 ? "below 1e-9" : value.toPrecision(1));

function Evidence({ alert, at }) {
  const { evidence } = alert;
  const rest = evidence?.rest;
  return html`<dl class="facts">
    ${evidence && html`<div><dt>Devices</dt><dd>${count(evidence.affected)} of ${count(evidence.judged)} judged</dd></div>`}
    ${rest && rest.judged > 0 && html`<div><dt>Elsewhere</dt><dd>${count(rest.affected)} of ${count(rest.judged)}</dd></div>`}
    ${evidence && alert.scope !== "device" && html`<div><dt>By chance</dt><dd>${chance(evidence.p_value)}</dd></div>`}
    ${evidence?.features.length > 0 && html`<div><dt>Features</dt><dd>${evidence.features.map((each) =>
      alert.scope === "device" ? words(each.feature) : `${words(each.feature)} (${each.devices})`).join(", ")}</dd></div>`}
    ${evidence && alert.scope !== "device" && html`<div><dt>Among them</dt><dd>${evidence.devices.join(", ")}${
      evidence.affected > evidence.devices.length ? " …" : ""}</dd></div>`}
    <div><dt>Found</dt><dd>${plural(alert.seen, "time")}</dd></div>
    ${alert.silenced_until_ms != null && html`<div><dt>Silent until</dt><dd><time title=${moment(alert.silenced_until_ms)}>
      ${moment(alert.silenced_until_ms)}</time></dd></div>`}
    ${alert.resolved_ms != null && html`<div><dt>Ended</dt><dd>${ago(alert.resolved_ms, at)}</dd></div>`}
    ${alert.note && html`<div><dt>Note</dt><dd>${alert.note}</dd></div>`}
    ${alert.state !== "resolved" && html`<div class="commands"><dt>To act</dt><dd>
      ${alert.state !== "acknowledged" && html`<code>shoal alerts ack ${alert.id}</code>`}
      <code>shoal alerts silence ${alert.id} --for 12h</code>
      <code>shoal alerts resolve ${alert.id}</code></dd></div>`}
  </dl>`;
}

function Alert({ alert, at }) {
  const place = SCOPES[alert.scope];
  const subject = alert.scope === "fleet" ? "The fleet" : alert.subject;
  return html`<li class=${alert.state}>
    <div class="head"><${State} alert=${alert} />
      <time title=${moment(alert.opened_ms)}>${ago(alert.opened_ms, at)}</time></div>
    <p>${place && html`<span class="scope">${place}</span> `}${subject
      && html`<b>${subject}</b> `}${alert.text}</p>
    <details><summary>Evidence and commands</summary><${Evidence} alert=${alert} at=${at} /></details>
  </li>`;
}

export function Alerts({ data }) {
  const [all, setAll] = useState(false);
  const at = useNow();
  const alerts = data.alerts.alerts;
  const open = data.alerts.open;
  const shown = all ? alerts : alerts.slice(0, SHOWN);
  return html`<${Panel} id="alerts" title="Alerts" note=${`${count(open)} open`}>
    ${alerts.length === 0 && html`
      <${Empty} title="Nothing to tell">Drift, lost accuracy and refused messages appear here.<//>`}
    <ul class="alerts">${shown.map((alert) => html`<${Alert} key=${alert.id} alert=${alert} at=${at} />`)}</ul>
    ${alerts.length > SHOWN && html`<button class="more" type="button" aria-expanded=${all}
        onClick=${() => setAll(!all)}>
      ${all ? "Show fewer" : `Show all ${count(alerts.length)}`}</button>`}
  <//>`;
}
