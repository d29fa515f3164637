/** The figures one looks at first. */
import { html } from "./dom.js";
import { UNKNOWN, count, model, percent, plural, points, sentence } from "./format.js";

const Tile = ({ name, href, tone = "", value, of, children }) => html`
  <a class="tile ${tone}" href=${href}>
    <span class="name">${name}</span>
    <span class="value">${value}${of != null && html`<small> / ${of}</small>`}</span>
    <span class="sub">${children}</span>
  </a>`;

function accuracySub(accuracy) {
  if (!accuracy || accuracy.value == null) return "no labels have arrived yet";
  const { gain, devices } = accuracy;
  const whose = `median of ${plural(devices, "device")}`;
  if (gain == null) return whose;
  return html`<b class=${gain >= 0 ? "up" : "down"}>${points(gain)}</b> vs model before<br />${whose}`;
}

export function Tiles({ data }) {
  const { summary, rollouts } = data;
  const { devices, drifting, totals, accuracy } = summary;
  const rollout = rollouts[0];
  const offline = devices.total - devices.online;
  return html`<div class="tiles">
    <${Tile} name="Online" href="#fleet" value=${count(devices.online)} of=${count(devices.total)}
        tone=${offline ? "warn" : ""}>
      ${devices.total === 0 ? "no device has enrolled" : offline ? `${plural(offline, "device")} silent` : "every device answers"}
    <//>
    <${Tile} name="Accuracy now" href="#accuracy" value=${percent(accuracy.value)}>
      ${accuracySub(accuracy)}<//>
    <${Tile} name="Drifting" href="#fleet" value=${count(drifting.length)} of=${count(devices.total)}
        tone=${drifting.length ? "warn" : ""}>
      ${drifting.length ? drifting.slice(0, 3).join(", ") + (drifting.length > 3 ? " …" : "") : "no drift seen"}
    <//>
    <${Tile} name="Rollout" href="#rollouts"
        value=${rollout ? html`${rollout.counts.confirmed}` : UNKNOWN}
        of=${rollout ? rollout.eligible : null}>
      ${rollout
        ? html`confirmed ${model(rollout)}<br />${sentence(rollout.state)}` : "none yet"}
    <//>
    <${Tile} name="Records stored" href="#alerts" value=${count(totals.stored)}>
      <span class=${totals.lost ? "down" : ""}>${count(totals.lost)} lost</span> ·${" "}
      <span class=${totals.quarantined ? "down" : ""}>${count(totals.quarantined)} quarantined</span>
    <//>
  </div>`;
}
