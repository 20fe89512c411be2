"use strict";
(() => {
  const { run, slides } = JSON.parse(document.getElementById("data").textContent);
  const PER_PAGE = 50, MOST_KINDS = 40;
  const at = (id) => document.getElementById(id);

  const number = (value) => (value === null ? "" : value.toLocaleString("en"));
  const share = (value) => (value === null ? "" : (100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0) + " %");
  const capital = (text) => text[0].toUpperCase() + text.slice(1);
  const link = ([text, href]) => element("a", { href }, text);
  const spaced = (parts) => parts.flatMap((part, index) => (index ? [" · ", part] : [part]));

  // Warnings of one kind differ by their numbers only.
  const kindOf = (text) => text.replace(/\d+(?:[.,]\d+)*/g, "…");
  const kinds = new Map();
  for (const slide of slides) {
    slide.kinds = new Set(slide.warnings.flatMap((text) => text.split("; ")).map(kindOf));
    for (const kind of slide.kinds) kinds.set(kind, (kinds.get(kind) || 0) + 1);
    slide.text = [slide.id, slide.file, ...slide.errors, ...slide.warnings].join("\n").toLowerCase();
  }
  const measured = [...new Set(slides.flatMap((slide) => Object.keys(slide.qc)))].sort();

  const filters = [
    ["all slides", () => true],
    ["failed", (slide) => slide.state === "failed"],
    ["with warnings", (slide) => slide.warnings.length > 0],
    ["without tiles", (slide) => slide.tiles === 0],
    ["without warnings or errors", (slide) => !slide.warnings.length && !slide.errors.length],
    ["not finished yet", (slide) => slide.state === "to do" || slide.state === "in progress"],
  ];
  const fixed = filters.length;
  for (const [kind] of [...kinds].sort((a, b) => b[1] - a[1]).slice(0, MOST_KINDS))
    filters.push([kind, (slide) => slide.kinds.has(kind)]);

  const columns = [
    { name: "Slide", value: (slide) => slide.id, cell: slideCell, css: "slide" },
    { name: "Pictures", cell: picturesCell, css: "images" },
    { name: "Tiles", value: (slide) => slide.tiles, cell: (slide) => [number(slide.tiles)], css: "number" },
    { name: "Tissue", title: "mean share of tissue in its tiles", value: (slide) => slide.tissue,
      cell: (slide) => [share(slide.tissue)], css: "number" },
    ...(measured.length ? [{ name: "Quality", cell: qualityCell, css: "quality" }] : []),
    { name: "State", value: (slide) => slide.state, cell: stateCell, css: "state" },
    ...measured.map((name) => ({ name: capital(name), value: (slide) => slide.qc[name] ?? null, hidden: true })),
    { name: "Warnings", value: (slide) => slide.errors.length * 1000 + slide.warnings.length, hidden: true },
  ];
  const sorts = [{ name: "order of the run" }, ...columns.filter((column) => column.value)];
  const view = { text: "", filter: 0, sort: 0, down: false, page: 0, found: slides };

  function slideCell(slide) {
    const name = slide.href ? element("a", { href: slide.href }, slide.id) : slide.id;
    const lines = [element("div", { class: "name" }, name)];
    for (const text of slide.errors) lines.push(element("div", { class: "error" }, "Failed: " + text));
    for (const text of slide.warnings) lines.push(element("div", { class: "warning" }, "Warning: " + text));
    for (const text of [...slide.tiled, slide.size]) if (text) lines.push(element("div", { class: "quiet" }, text));
    lines.push(element("div", { class: "quiet" }, slide.file + (slide.backend ? ", read by " + slide.backend : "")));
    if (slide.links.length) lines.push(element("div", { class: "quiet" }, ...spaced(slide.links.map(link))));
    return lines;
  }

  function picturesCell(slide) {
    if (!slide.pictures.length) return [element("span", { class: "quiet" }, "no pictures")];
    return [element("div", { class: "pictures" }, ...slide.pictures.map((picture) => figure(slide, picture)))];
  }

  function figure(slide, picture) {
    if (!picture.src) return element("figure", {}, element("figcaption", { class: "warning" }, picture.text));
    const image = element("img", { src: picture.src, alt: `${slide.id}: ${picture.text}`, loading: "lazy" });
    image.addEventListener("error", () => image.replaceWith("the picture is gone"));
    const open = element("button", { type: "button", title: "larger", onclick: () => enlarge(slide, picture) }, image);
    return element("figure", {}, open, element("figcaption", {}, picture.text));
  }

  function enlarge(slide, picture) {
    const close = element("button", { type: "button", onclick: () => at("large").close() }, "Close");
    at("large").replaceChildren(
      element("p", { class: "name" }, slide.id),
      element("img", { src: picture.src, alt: `${slide.id}: ${picture.text}` }),
      element("p", {}, picture.text),
      ...(picture.kind === "map" ? [element("img", { class: "key", src: at("key").src, alt: at("key").alt })] : []),
      ...[...slide.tiled, slide.size].filter(Boolean).map((text) => element("p", { class: "quiet" }, text)),
      close,
    );
    at("large").showModal();
  }

  function stateCell(slide) {
    const lines = [element("div", { class: slide.state }, slide.state)];
    for (const encoder of slide.encoders) {
      const parts = [encoder.name + (encoder.dim ? ` (${encoder.dim})` : "")];
      if (encoder.state !== slide.state) parts.push(encoder.state);
      lines.push(element("div", { class: "quiet" }, ...spaced([...parts, ...encoder.links.map(link)])));
    }
    return lines;
  }

  function qualityCell(slide) {
    return measured.filter((name) => name in slide.qc)
      .map((name) => element("div", { class: "quiet", title: "mean share of its tiles" }, `${name} ${share(slide.qc[name])}`));
  }

  function compare(column) {
    const side = view.down ? -1 : 1;
    return (a, b) => {
      const [left, right] = [column.value(a), column.value(b)];
      if (left === null || right === null) return (left === null) - (right === null); // last either way
      if (typeof left === "string") return side * left.localeCompare(right, "en", { numeric: true });
      return side * (left - right);
    };
  }

  function find() {
    const words = view.text.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = filters[view.filter][1];
    view.found = slides.filter((slide) => fits(slide) && words.every((word) => slide.text.includes(word)));
    if (sorts[view.sort].value) view.found.sort(compare(sorts[view.sort]));
    else if (view.down) view.found.reverse();
    view.page = 0;
    show();
  }

  function show() {
    const first = view.page * PER_PAGE, last = Math.min(first + PER_PAGE, view.found.length);
    const shown = columns.filter((column) => !column.hidden);
    at("rows").replaceChildren(...view.found.slice(first, last).map((slide) => element("tr",
      slide.state === "failed" ? { class: "failed" } : {},
      ...shown.map((column) => element("td",
        { class: column.css || "", ...(["number", "quality"].includes(column.css) ? { "data-name": column.name } : {}) },
        ...column.cell(slide))))));
    at("count").textContent = view.found.length
      ? `${number(view.found.length)} of ${number(slides.length)} slides` +
        (view.found.length > PER_PAGE ? `, ${number(first + 1)} to ${number(last)} shown` : "")
      : "No slide fits: change the search or what is shown.";
    for (const head of at("heads").children) {
      const own = sorts[view.sort].name === head.dataset.name;
      if (own) head.setAttribute("aria-sort", view.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    showPages();
  }

  function showPages() {
    const last = Math.ceil(view.found.length / PER_PAGE) - 1;
    const turn = (text, page, off) => {
      const made = element("button", { type: "button", onclick: () => { view.page = page; show(); scrollTo(0, 0); } }, text);
      made.disabled = off;
      return made;
    };
    at("pages").replaceChildren(...(last < 1 ? [] : [
      turn("First", 0, view.page === 0), turn("Previous", view.page - 1, view.page === 0),
      `page ${number(view.page + 1)} of ${number(last + 1)}`,
      turn("Next", view.page + 1, view.page === last), turn("Last", last, view.page === last),
    ]));
  }

  function sortBy(index, down) {
    view.sort = index;
    view.down = down;
    at("sort").value = index;
    at("order").setAttribute("aria-pressed", down);
    find();
  }

  const total = slides.reduce((sum, slide) => sum + (slide.tiles || 0), 0);
  at("about").textContent = [
    `${number(slides.length)} slides`,
    ...Object.entries(run.states).filter(([, count]) => count).map(([state, count]) => `${number(count)} ${state}`),
    `${number(total)} tiles`,
    ...(run.encoders.length ? [`encoded by ${run.encoders.join(", ")}`] : []),
  ].join(" · ");
  at("run-links").replaceChildren(...spaced(run.links.map(link)));
  filters.forEach(([name, fits], index) => {
    const count = number(slides.filter(fits).length);
    at("filter").append(element("option", { value: index }, `${index < fixed ? name : "“" + name + "”"} (${count})`));
  });
  sorts.forEach((column, index) => at("sort").append(element("option", { value: index }, column.name)));
  for (const column of columns.filter((each) => !each.hidden)) {
    const index = sorts.indexOf(column);
    const toggle = () => sortBy(index, view.sort === index && !view.down);
    at("heads").append(element("th", { scope: "col", class: column.css || "", "data-name": column.name },
      column.value ? element("button", { type: "button", title: column.title || "sort", onclick: toggle }, column.name)
        : column.name));
  }
  at("text").addEventListener("input", () => { view.text = at("text").value; find(); });
  at("filter").addEventListener("change", () => { view.filter = Number(at("filter").value); find(); });
  at("sort").addEventListener("change", () => sortBy(Number(at("sort").value), view.down));
  at("order").addEventListener("click", () => sortBy(view.sort, !view.down));
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  show();
})();
