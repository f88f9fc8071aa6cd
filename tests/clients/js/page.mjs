// A page without a browser: the names of happy-dom's window that React and the polyfill look for. The network is node's.

import { Window } from "happy-dom";

const NAMES = ["document", "navigator", "location", "HTMLElement", "HTMLIFrameElement", "Node", "MutationObserver"];

export function openPage() {
  const window = new Window({ url: "http://localhost/" });
  const names = Object.fromEntries(NAMES.map((name) => [name, window[name]]));
  for (const [name, value] of Object.entries({ window, self: window, ...names })) {
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  }
  return window;
}
