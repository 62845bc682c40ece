// From disk a browser lets no page read another, so search lists pages without their summaries.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// What style alone cannot mend for readers with a keyboard or a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-links summary")) summary.ariaLabel = "Pages below this one";
  // book.css lets tables scroll, and what scrolls must be reached by keyboard.
  for (const table of document.querySelectorAll(".bd-article table")) table.tabIndex = 0;
  // Said to be a list, without items, and its entries what is no longer a role.
  for (const list of document.querySelectorAll(".citation-list, .citation")) list.removeAttribute("role");
});
