/** Small drawn things that several panels share. */
import { html } from "./dom.js";

/** A state in words with a dot; colour is never the only sign. */
export const Badge = ({ tone = "idle", children, title }) =>
  html`<span class="badge ${tone}" title=${title}><i aria-hidden="true"></i>${children}</span>`;

export const Panel = ({ id, title, note, children, className = "" }) => html`
  <section class="panel ${className}" id=${id} aria-labelledby=${`${id}-title`}>
    <header><h2 id=${`${id}-title`}>${title}</h2><div class="note">${note}</div></header>
    ${children}
  </section>`;

/** What a panel says when it has nothing: what that means and what would change it. */
export const Empty = ({ title, children }) =>
  html`<div class="empty"><strong>${title}</strong><p>${children}</p></div>`;

/** A line of up to 40 values, nulls are gaps. Decoration: the number stands beside it. */
export function Spark({ values, width = 88, height = 24, low = 0, high = 1, tone = "" }) {
  const x = (i) => (values.length < 2 ? width / 2 : 1.5 + (i * (width - 3)) / (values.length - 1));
  const y = (value) => height - 2 - ((value - low) / (high - low || 1)) * (height - 4);
  let path = "";
  let pen = "M";
  let last = null;
  values.forEach((value, i) => {
    if (value == null) { pen = "M"; return; }
    path += `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
    last = [x(i), y(value)];
  });
  return html`<svg class="spark ${tone}" width=${width} height=${height}
      viewBox="0 0 ${width} ${height}" aria-hidden="true" focusable="false">
    <path d=${path} />${last && html`<circle cx=${last[0]} cy=${last[1]} r="2" />`}
  </svg>`;
}

/** Parts of a whole, side by side. @param parts {{tone, value, label}[]} */
export function Meter({ parts, total, label }) {
  return html`<div class="meter" role="img" aria-label=${label}>
    ${parts.filter((part) => part.value > 0).map((part) => html`
      <span key=${part.label} class=${part.tone} title="${part.label}: ${part.value}"
        style=${{ width: `${(100 * part.value) / Math.max(1, total)}%` }}></span>`)}
  </div>`;
}
