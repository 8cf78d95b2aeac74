"use strict";

const opacity = document.getElementById("opacity");
if (opacity) {
  const show = () => {
    document.documentElement.style.setProperty("--opacity", opacity.value / 100);
    opacity.nextElementSibling.value = `${opacity.value}\u202f%`;
    opacity.setAttribute("aria-valuetext", `${opacity.value}\u202f%`);
  };
  opacity.addEventListener("input", show);
  show();
  document.querySelector(".tools").hidden = false;
}

for (const box of document.querySelectorAll(".shows")) {
  const show = () => {
    for (const tile of document.querySelectorAll(".viewer [data-method]")) {
      if (tile.dataset.method === box.value) tile.hidden = !box.checked;
    }
  };
  box.addEventListener("change", show);
  show();
}

for (const button of document.querySelectorAll(".scores thead button")) {
  const header = button.parentElement;
  const key = (row) => row.children[header.cellIndex].dataset.value;
  const compare = header.cellIndex === 0 ? (a, b) => a.localeCompare(b) : (a, b) => a - b;
  button.disabled = false;
  button.addEventListener("click", () => {
    const now = header.getAttribute("aria-sort");
    const opposite = now === "ascending" ? "descending" : "ascending";
    const order = now === "none" ? button.dataset.first : opposite;
    for (const other of header.parentElement.children) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    for (const body of header.closest("table").tBodies) {
      const rows = [...body.rows].slice(1);
      rows.sort((a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        return sign * compare(key(a), key(b));
      });
      body.append(...rows);
    }
  });
}
