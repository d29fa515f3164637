/** Lay out the page and keep it in step with the server. */
import { html, render, useEffect, useState } from "./dom.js";
import { start, useLive, useNow } from "./live.js";
import { clock, duration } from "./format.js";
import { Accuracy } from "./accuracy.js";
import { Alerts } from "./alerts.js";
import { Drift } from "./drift.js";
import { Fleet } from "./fleet.js";
import { Rollouts } from "./rollouts.js";
import { Rounds } from "./rounds.js";
import { Tiles } from "./tiles.js";

const LINKS = {
  connecting: ["idle", "Connecting"],
  live: ["ok", "Live"],
  stale: ["warn", "Stale"],
  lost: ["bad", "Reconnecting"],
};

function Link({ link, heardMs }) {
  const [tone, word] = LINKS[link];
  const age = useNow();
  return html`<div class="link ${tone}">
    <i aria-hidden="true"></i><span role="status">${word}</span>
    ${link !== "live" && heardMs != null && html`
      <span class="age">last heard ${duration(age - heardMs)} ago</span>`}
  </div>`;
}

function Theme() {
  const [name, setName] = useState(window.shoalTheme.name);
  useEffect(() => {
    const follow = (event) => setName(event.detail);
    addEventListener("shoal:theme", follow);
    return () => removeEventListener("shoal:theme", follow);
  }, []);
  const other = name === "dark" ? "light" : "dark";
  return html`<button class="icon" type="button" onClick=${() => window.shoalTheme.toggle()}
      aria-label="Switch to the ${other} theme" title="Switch to the ${other} theme">
    <svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">
      ${name === "dark"
        ? html`<circle cx="10" cy="10" r="3.6" /><path d="M10 1.8v2.2M10 16v2.2M1.8 10H4M16 10h2.2M4.2 4.2l1.6 1.6M14.2 14.2l1.6 1.6M4.2 15.8l1.6-1.6M14.2 5.8l1.6-1.6" />`
        : html`<path d="M16.5 11.8A7 7 0 0 1 8.2 3.5a7 7 0 1 0 8.3 8.3z" />`}
    </svg>
  </button>`;
}

/** The shape of the page before there is anything to show. */
const Waiting = () => html`<div class="waiting">
  <p class="hidden">Waiting for the server.</p>
  <div class="tiles" aria-hidden="true">${[1, 2, 3, 4, 5].map((key) => html`<span class="tile" key=${key} />`)}</div>
  <div class="grid" aria-hidden="true"><span class="panel" /><span class="panel" /></div>
</div>`;

function Trouble({ link, error, heardMs }) {
  if (error) {
    return html`<div class="trouble" role="alert"><strong>${error.message}</strong>
      ${error.hint && html`<span>${error.hint}</span>`}</div>`;
  }
  if (link === "lost" || link === "stale") {
    const what = link === "lost" ? "The connection to the server is lost" : "The server is silent";
    return html`<div class="trouble" role="alert"><strong>${what}.</strong>
      <span>${heardMs == null ? "Nothing was received yet." : `What you see is as of ${clock(heardMs)}.`}
        The page keeps trying.</span></div>`;
  }
  return null;
}

function Console() {
  const { link, data, error, heardMs } = useLive();
  const [hovered, setHovered] = useState(null);
  const [pinned, setPinned] = useState(null);
  const focus = hovered ?? pinned;
  const pin = (device) => setPinned(pinned === device ? null : device);
  const stale = link === "stale" || link === "lost";
  return html`
    <header class="bar">
      <div class="brand"><img src="icon.svg" width="26" height="26" alt="" /><span>shoal</span>
        <span class="where">Fleet</span></div>
      <${Link} link=${link} heardMs=${heardMs} />
      <${Theme} />
    </header>
    <main class=${stale ? "stale" : ""} aria-busy=${data == null}>
      <h1 class="hidden">Fleet overview</h1>
      <${Trouble} link=${link} error=${error} heardMs=${heardMs} />
      ${data ? html`<${Tiles} data=${data} /><div class="grid">
        <div class="stack">
          <${Accuracy} data=${data} focus=${focus} onHover=${setHovered} onPin=${pin} />
          <${Fleet} data=${data} focus=${focus} pinned=${pinned} onHover=${setHovered} onPin=${pin} />
          <${Drift} data=${data} />
        </div>
        <div class="stack">
          <${Rollouts} data=${data} />
          <${Alerts} data=${data} />
          <${Rounds} data=${data} />
        </div>
      </div>` : html`<${Waiting} />`}
    </main>
    ${data && html`<footer class="foot">shoal ${data.summary.version} · this page reads and changes
      nothing · times are local</footer>`}`;
}

const home = document.getElementById("console");
home.replaceChildren();
render(html`<${Console} />`, home);
start();
