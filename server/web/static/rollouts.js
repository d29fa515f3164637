/** Rollouts: who was asked, what came of it, and the judgement of each wave with its reasons. */
import { html } from "./dom.js";
import { ago, count, model, moment, plural, sentence, short } from "./format.js";
import { useNow } from "./live.js";
import { Badge, Empty, Meter, Panel } from "./marks.js";

const TONES = {
  completed: "ok", failed: "bad", aborted: "bad", paused: "warn", superseded: "idle",
};

/** Device states in the order of progress, with what each means. */
const STATES = [
  ["confirmed", "confirmed", "runs it, by its own report"],
  ["trial", "on trial", "runs it, not yet for good"],
  ["downloading", "downloading", "fetches it"],
  ["offered", "offered", "was told, has not answered"],
  ["failed", "failed", "refused it or fell back"],
  ["silent", "silent", "was told, said nothing in time"],
  ["superseded", "superseded", "got a newer rollout"],
  ["reverting", "going back", "was told to run the model before"],
  ["reverted", "back", "runs the model before, by its own report"],
  ["eligible", "waiting", "its wave has not begun"],
];

const VERDICTS = { PASS: "ok", FAIL: "bad", INSUFFICIENT: "warn" };

function Evidence({ verdict }) {
  return html`<div class="gate">
    <${Badge} tone=${VERDICTS[verdict.verdict] ?? "idle"}>${verdict.verdict}<//>
    <ul>${verdict.checks.map((check) => html`<li key=${check.text} class=${VERDICTS[check.verdict] ?? "idle"}
      title=${check.verdict}><i aria-hidden="true"></i><span>${check.text}</span></li>`)}</ul>
  </div>`;
}

function Wave({ wave, number, current, running }) {
  const done = wave.counts.confirmed;
  const off = wave.counts.failed + wave.counts.silent;
  const began = wave.began_ms != null;
  const doing = !began ? "not begun" : current && running ? "in progress" : "ended";
  return html`<li class=${current && running ? "current" : ""}>
    <div class="head"><b>Wave ${number}</b><span>${plural(wave.devices, "device")}</span>
      <span class="faint">${doing}</span>
      <span class="right">${count(done)} / ${count(wave.devices)} confirmed${off > 0 && html`, <b class="down">${count(off)} not</b>`}</span></div>
    ${wave.evidence
      ? html`<${Evidence} verdict=${wave.evidence} />`
      : began && html`<p class="faint">No judgement yet: the gate waits for the wave's windows.</p>`}
  </li>`;
}

function Rollout({ rollout, at }) {
  const running = !(rollout.state in TONES) || rollout.state === "paused";
  const parts = STATES.map(([tone, label]) => ({ tone, label, value: rollout.counts[tone] }));
  const spoken = parts.filter(({ value }) => value > 0)
    .map(({ label, value }) => `${value} ${label}`).join(", ");
  return html`<div class="rollout">
    <div class="head">
      <span class="big">${model(rollout)}</span>
      <code title=${rollout.model_sha256}>${short(rollout.model_sha256)}</code>
      <${Badge} tone=${TONES[rollout.state] ?? "run"}>${sentence(rollout.state)}<//>
    </div>
    <${Meter} parts=${parts} total=${rollout.eligible} label="Of ${rollout.eligible} devices: ${spoken}" />
    <ul class="legend">${STATES.map(([tone, label, meaning]) => rollout.counts[tone] > 0 && html`
      <li key=${tone} class=${tone} title=${meaning}><i aria-hidden="true"></i><b>${count(rollout.counts[tone])}</b> ${label}</li>`)}
      <li class="total">of ${plural(rollout.eligible, "device")}</li></ul>
    ${rollout.reason && html`<p class="reason">${rollout.reason}</p>`}
    <ol class="waves">${rollout.waves.map((wave, i) => html`<${Wave} key=${i} wave=${wave} number=${i + 1}
      current=${rollout.wave === i} running=${running} />`)}</ol>
    <p class="faint">Started <time title=${moment(rollout.created_ms)}>${ago(rollout.created_ms, at)}</time>,
      changed <time title=${moment(rollout.changed_ms)}>${ago(rollout.changed_ms, at)}</time></p>
  </div>`;
}

export function Rollouts({ data }) {
  const at = useNow();
  const rollouts = data.rollouts;
  const earlier = rollouts.slice(1, 4);
  return html`<${Panel} id="rollouts" title="Rollout" note=${rollouts.length > 1 ? `${count(rollouts.length)} in all` : ""}>
    ${rollouts.length === 0 && html`<${Empty} title="No rollout yet">
      <code>shoal rollouts create MODEL --waves 2,0</code> starts one: two canaries, then all.<//>`}
    ${rollouts.length > 0 && html`<${Rollout} rollout=${rollouts[0]} at=${at} />`}
    ${earlier.length > 0 && html`<ul class="earlier" aria-label="Earlier rollouts">${earlier.map((each) => html`
      <li key=${each.id}><span>${model(each)}</span>
        <span class="faint">${count(each.counts.confirmed)} / ${count(each.eligible)} confirmed</span>
        <${Badge} tone=${TONES[each.state] ?? "run"}>${sentence(each.state)}<//></li>`)}</ul>`}
  <//>`;
}
