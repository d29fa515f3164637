/** Federated rounds: how far, who took part, and whether the loss falls. */
import { html } from "./dom.js";
import { ago, count, decimal, moment, plural, sentence, short } from "./format.js";
import { useNow } from "./live.js";
import { Badge, Empty, Meter, Panel, Spark } from "./marks.js";

const TONES = { running: "run", quantizing: "run", done: "ok", failed: "bad" };

function Run({ run, at }) {
  const losses = run.history.map((entry) => entry.loss);
  const known = losses.filter((loss) => loss != null);
  const last = run.history.at(-1);
  return html`<div class="round">
    <div class="head">
      <span class="big">Round ${count(run.round)}<small> of ${count(run.rounds)}</small></span>
      <${Badge} tone=${TONES[run.state]}>${sentence(run.state)}<//>
    </div>
    <${Meter} total=${run.rounds} label="${run.round} of ${run.rounds} rounds finished"
      parts=${[{ tone: "confirmed", value: run.round, label: "finished" }]} />
    <dl class="facts">
      <div><dt>Loss on devices</dt><dd>${known.length > 0
        ? html`${decimal(known[0])} <span aria-label="to">→</span> ${decimal(known.at(-1))}` : "not told yet"}
        ${known.length > 1 && html`<${Spark} values=${losses} low=${Math.min(...known)} high=${Math.max(...known)} />`}</dd></div>
      <div><dt>Last round</dt><dd>${last ? `${plural(last.devices, "device")} took part` : "not finished yet"}</dd></div>
      <div><dt>Started</dt><dd><time title=${moment(run.created_ms)}>${ago(run.created_ms, at)}</time> from
        <code>${short(run.base_sha256)}</code></dd></div>
      ${run.candidate_sha256 && html`<div><dt>Candidate</dt><dd><code>${short(run.candidate_sha256)}</code></dd></div>`}
      ${run.reason && html`<div><dt>Reason</dt><dd>${run.reason}</dd></div>`}
    </dl>
  </div>`;
}

export function Rounds({ data }) {
  const at = useNow();
  const runs = data.rounds;
  return html`<${Panel} id="rounds" title="Federated rounds"
      note=${runs.length > 1 ? `${count(runs.length)} runs` : ""}>
    ${runs.length === 0 && html`<${Empty} title="No rounds yet">
      <code>shoal rounds start MODEL</code> lets the devices learn on their own labels.<//>`}
    ${runs.length > 0 && html`<${Run} run=${runs[0]} at=${at} />`}
  <//>`;
}
