// From disk a browser lets no page read another, so search lists pages without their summaries.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// What style alone cannot mend for readers with a keyboard or a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-links summary")) summary.ariaLabel = "Pages below this one";
  // Tables scroll and, on a phone, figures and code, and what scrolls must be reached by keyboard. Those of an explorer fit.
  const tables = ".bd-article table:not(.scbmlp-explorer table)";
  const scrolled = matchMedia("(max-width: 600px)").matches ? `${tables}, .bd-article figure, .bd-article pre` : tables;
  for (const wide of document.querySelectorAll(scrolled)) wide.tabIndex = 0;
  // Said to be a list, without items, and its entries what is no longer a role.
  for (const list of document.querySelectorAll(".citation-list, .citation")) list.removeAttribute("role");
});
