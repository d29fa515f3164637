/**
 * The connection to the server: one WebSocket, and the newest snapshot it told.
 *
 *   connecting --snapshot--> live --nothing for STALE_MS--> stale --snapshot--> live
 *        any --closed--> lost --retry, 1 s doubling to 15 s--> connecting
 *
 * Ages are counted by the server's clock: this machine's may be wrong.
 */
import { useEffect, useState } from "./dom.js";

const STALE_MS = 15_000; // three ticks of the server
const RETRY_MS_MAX = 15_000;

const state = { link: "connecting", data: null, error: null, heardAt: 0, heardMs: null, skewMs: 0 };
const listeners = new Set();
let retryMs = 1000;

const tell = () => listeners.forEach((listener) => listener({ ...state }));

/** Now, by the server's clock, Unix ms. */
export const now = () => Date.now() + state.skewMs;

function hear(message) {
  state.link = "live";
  state.heardAt = performance.now();
  state.heardMs = message.now_ms;
  state.skewMs = message.now_ms - Date.now();
  if (message.type === "snapshot") {
    state.data = message.data;
    state.error = null;
  } else if (message.type === "error") {
    state.error = message.error;
  }
  retryMs = 1000;
  tell();
}

function connect() {
  const url = new URL("api/v1/live", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  socket.onmessage = (event) => hear(JSON.parse(event.data));
  socket.onclose = (event) => {
    state.link = "lost";
    if (event.code === 1013) state.error = { message: event.reason, hint: "close other pages" };
    tell();
    setTimeout(connect, retryMs);
    retryMs = Math.min(2 * retryMs, RETRY_MS_MAX);
  };
}

export function start() {
  connect();
  setInterval(() => {
    if (state.link === "live" && performance.now() - state.heardAt > STALE_MS) {
      state.link = "stale";
      tell();
    }
  }, 1000);
}

/** The state of the connection, newest first render on. */
export function useLive() {
  const [seen, setSeen] = useState({ ...state });
  useEffect(() => {
    listeners.add(setSeen);
    setSeen({ ...state });
    return () => listeners.delete(setSeen);
  }, []);
  return seen;
}

/** Now by the server's clock, renewed every second: for ages. */
export function useNow() {
  const [at, setAt] = useState(now());
  useEffect(() => {
    const timer = setInterval(() => setAt(now()), 1000);
    return () => clearInterval(timer);
  }, []);
  return at;
}
