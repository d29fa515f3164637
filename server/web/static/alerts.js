/** Alerts as the server words them, open ones first. */
import { html, useState } from "./dom.js";
import { ago, count, moment, sentence } from "./format.js";
import { useNow } from "./live.js";
import { Badge, Empty, Panel } from "./marks.js";

const SHOWN = 6;

function Alert({ alert, at }) {
  const open = alert.state === "open";
  return html`<li class=${open ? "open" : "resolved"}>
    <div class="head">
      <${Badge} tone=${open ? alert.tone : "ok"}>${open ? sentence(alert.kind) : "Resolved"}<//>
      <time title=${moment(alert.opened_ms)}>${ago(alert.opened_ms, at)}</time>
    </div>
    <p>${alert.device && html`<b>${alert.device}</b> `}${alert.text}</p>
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
