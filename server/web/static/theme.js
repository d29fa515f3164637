// Set the theme before the first paint; a plain script, because a module would come too late.
(() => {
  const KEY = "shoal.theme";
  const system = matchMedia("(prefers-color-scheme: light)");
  const chosen = () => {
    try { return localStorage.getItem(KEY); } catch { return null; } // storage may be forbidden
  };
  const apply = () => {
    const name = chosen() ?? (system.matches ? "light" : "dark");
    document.documentElement.dataset.theme = name;
    dispatchEvent(new CustomEvent("shoal:theme", { detail: name }));
  };
  system.addEventListener("change", apply);
  window.shoalTheme = {
    get name() { return document.documentElement.dataset.theme; },
    toggle() {
      const name = this.name === "dark" ? "light" : "dark";
      try { localStorage.setItem(KEY, name); } catch { /* then it lasts as long as the page */ }
      document.documentElement.dataset.theme = name;
      dispatchEvent(new CustomEvent("shoal:theme", { detail: name }));
    },
  };
  apply();
})();
