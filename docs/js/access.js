// The theme adds buttons to code blocks as landmarks without a name, and lets wide code take the focus only where there is a mouse.
const improve = () => {
  document.querySelectorAll("nav.md-code__nav:not([role])").forEach((nav) => nav.setAttribute("role", "none"));
  document.querySelectorAll("pre > code:not([tabindex])").forEach((code) => code.setAttribute("tabindex", "0"));
};
improve();
new MutationObserver(improve).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["tabindex"] });
