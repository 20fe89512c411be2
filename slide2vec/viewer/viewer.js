// Drawn on a canvas without a library: nothing to fetch when a wheel is built, and tiles, colours and slide are
// one picture, however many tiles there are.
(() => {
  const at = (id) => document.getElementById(id);
  const canvas = at("slide"), context = canvas.getContext("2d");
  const MOST_PICTURES = 600, AT_ONCE = 8, MOST_LISTED = 300, MOST_ZOOM = 8, LEAST_HOLE = 12; // px of the window, the last

  let run = { slides: [], encoders: [], side: 256 };
  let current = null; // the slide that is shown: {number, size, last, tiles, …}
  let eye = { x: 0, y: 0, zoom: 1 }; // the middle of the window, level-0 px; window px per level-0 px
  let colours = null, chosen = null, tissue = null, asked = 0;
  const pictures = new Map(); // address -> image; the latest last
  let loading = 0, wanted = [], drawing = false;

  async function ask(address) {
    const answer = await fetch(address);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }
  function tell(error) {
    at("message").hidden = !error;
    at("message").textContent = error ? error.message || String(error) : "";
  }
  const number = (value) => (value === null ? "" : value.toLocaleString("en"));
  const encoder = () => `encoder=${Number(at("encoder").value || 0)}`;

  // ---- the slide

  const empty = () => element("span", { class: "none" });
  function small(src) {
    const image = element("img", { src, alt: "", loading: "lazy" });
    image.addEventListener("error", () => image.replaceWith(empty()));
    return image;
  }
  function picture(address) {
    const there = pictures.get(address);
    if (there) { pictures.delete(address); pictures.set(address, there); }
    return there;
  }
  function fetchWanted() {
    while (loading < AT_ONCE && wanted.length) {
      const address = wanted.shift();
      if (pictures.has(address)) continue;
      const image = new Image();
      pictures.set(address, image);
      loading += 1;
      const done = (failed) => async () => {
        loading -= 1;
        image.failed = failed;
        draw();
        if (failed) ask(address).catch(tell); // the sentence why
      };
      image.onload = done(false);
      image.onerror = done(true);
      image.src = address;
    }
    for (const address of pictures.keys()) {
      if (pictures.size <= MOST_PICTURES) break;
      if (pictures.get(address).complete) pictures.delete(address);
    }
  }

  function draw() {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; paint(); });
  }
  const inWindow = (x, y) => [(x - eye.x) * eye.zoom + canvas.clientWidth / 2, (y - eye.y) * eye.zoom + canvas.clientHeight / 2];
  const onSlide = (x, y) => [(x - canvas.clientWidth / 2) / eye.zoom + eye.x, (y - canvas.clientHeight / 2) / eye.zoom + eye.y];

  function paint() {
    const dots = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * dots) || canvas.height !== Math.round(height * dots)) {
      canvas.width = Math.round(width * dots);
      canvas.height = Math.round(height * dots);
    }
    context.setTransform(dots, 0, 0, dots, 0, 0);
    context.fillStyle = "#e8e8e8";
    context.fillRect(0, 0, width, height);
    if (!current || !current.size) return;
    const [left, top] = inWindow(0, 0), [right, bottom] = inWindow(...current.size);
    context.fillStyle = "#fff";
    context.fillRect(left, top, right - left, bottom - top);
    if (current.pixels) paintPixels(dots, [left, top, right, bottom]);
    if (current.tiles) paintTiles();
    if (tissue && at("tissue").checked) { paintRings(tissue.outer, "#00a040"); paintRings(tissue.holes.filter(isSeen), "#e25c30"); }
    showScale();
  }

  function paintPixels(dots, [left, top, right, bottom]) {
    context.save();
    context.beginPath();
    context.rect(left, top, right - left, bottom - top);
    context.clip();
    const ideal = current.last + Math.ceil(Math.log2(eye.zoom * dots) - 0.01);
    const finest = Math.min(current.last, Math.max(0, ideal));
    wanted = [];
    // coarse ones below: seen until the fine ones are there
    for (let level = Math.max(0, Math.min(8, finest)); level <= finest; level += 1) {
      const step = run.side * 2 ** (current.last - level);
      const [x0, y0] = onSlide(0, 0), [x1, y1] = onSlide(canvas.clientWidth, canvas.clientHeight);
      const columns = [Math.max(0, Math.floor(x0 / step)), Math.min(Math.ceil(current.size[0] / step) - 1, Math.floor(x1 / step))];
      const rows = [Math.max(0, Math.floor(y0 / step)), Math.min(Math.ceil(current.size[1] / step) - 1, Math.floor(y1 / step))];
      for (let row = rows[0]; row <= rows[1]; row += 1)
        for (let column = columns[0]; column <= columns[1]; column += 1) {
          const address = `slides/${current.number}/image_files/${level}/${column}_${row}.jpg`;
          const image = picture(address);
          if (image && image.complete && !image.failed && image.naturalWidth) {
            const [x, y] = inWindow(column * step, row * step), scale = (step / run.side) * eye.zoom;
            context.drawImage(image, x, y, image.naturalWidth * scale + 0.5, image.naturalHeight * scale + 0.5);
          } else if (!image && (level === finest || level <= 8)) wanted.push(address);
        }
    }
    context.restore();
    fetchWanted();
  }

  function paintTiles() {
    const { x, y, side } = current.tiles, shown = side * eye.zoom;
    const [x0, y0] = onSlide(0, 0), [x1, y1] = onSlide(canvas.clientWidth, canvas.clientHeight);
    const grid = at("grid").checked && shown >= 5;
    context.globalAlpha = at("strength").value / 100;
    context.strokeStyle = "#1450dc";
    const lines = new Path2D();
    for (let index = 0; index < x.length; index += 1) {
      if (x[index] > x1 || y[index] > y1 || x[index] + side < x0 || y[index] + side < y0) continue;
      const [left, top] = inWindow(x[index], y[index]);
      if (colours) {
        context.fillStyle = "#" + colours.substr(6 * index, 6);
        context.fillRect(left, top, Math.max(1, shown), Math.max(1, shown));
      }
      if (grid) lines.rect(left, top, shown, shown);
    }
    context.globalAlpha = 0.7;
    context.lineWidth = 1;
    if (grid) context.stroke(lines);
    context.globalAlpha = 1;
    if (chosen === null || chosen >= x.length) return;
    const [left, top] = inWindow(x[chosen], y[chosen]);
    for (const [colour, width] of [["#111", 5], ["#ffe000", 3]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.strokeRect(left, top, Math.max(4, shown), Math.max(4, shown));
    }
  }

  // hundreds of holes a few pixels wide hide the tissue itself: they are there when one has zoomed in
  function isSeen(ring) {
    let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
    for (let i = 0; i < ring.length; i += 2) {
      x0 = Math.min(x0, ring[i]); x1 = Math.max(x1, ring[i]);
      y0 = Math.min(y0, ring[i + 1]); y1 = Math.max(y1, ring[i + 1]);
    }
    return Math.min(x1 - x0, y1 - y0) * eye.zoom >= LEAST_HOLE;
  }

  function paintRings(rings, colour) {
    context.lineJoin = "round";
    const path = new Path2D();
    for (const ring of rings) {
      for (let i = 0; i < ring.length; i += 2) path[i ? "lineTo" : "moveTo"](...inWindow(ring[i], ring[i + 1]));
      path.closePath();
    }
    for (const [of, width] of [["#191919", 4], [colour, 2]]) {
      context.strokeStyle = of;
      context.lineWidth = width;
      context.stroke(path);
    }
  }

  function showScale() {
    const um = current.spacing_um, bar = at("scale");
    bar.hidden = !um;
    if (!um) return;
    const most = (140 / eye.zoom) * um, power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].find((each) => each * power <= most) * power;
    bar.style.width = `${(length / um) * eye.zoom}px`;
    bar.firstElementChild.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  }

  const leastZoom = () => 0.9 * Math.min(canvas.clientWidth / current.size[0], canvas.clientHeight / current.size[1]);
  function seeAll() {
    if (!current || !current.size) return;
    eye = { x: current.size[0] / 2, y: current.size[1] / 2, zoom: leastZoom() };
    draw();
  }
  function zoomBy(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    if (!current || !current.size) return;
    const [fixedX, fixedY] = onSlide(x, y);
    eye.zoom = Math.min(MOST_ZOOM, Math.max(leastZoom() / 2, eye.zoom * factor));
    eye.x = fixedX - (x - canvas.clientWidth / 2) / eye.zoom;
    eye.y = fixedY - (y - canvas.clientHeight / 2) / eye.zoom;
    draw();
  }

  // ---- the tiles

  function offerTexts() {
    const option = at("by").querySelector("[value=text]"), has = run.texts[Number(at("encoder").value || 0)];
    option.disabled = !has;
    option.textContent = has ? "cosine to a text" : "cosine to a text: not with this encoder";
    if (!has && at("by").value === "text") at("by").value = "";
  }

  async function recolour() {
    const by = at("by").value, mine = ++asked;
    at("words").hidden = by !== "text";
    at("key").replaceChildren();
    const waits = !by || (by === "tile" && chosen === null) || (by === "text" && !at("text").value.trim());
    if (!current || !current.tiles || !current.tiles.embedded || waits) {
      if (by === "tile" && chosen === null) at("key").textContent = "Click a tile.";
      colours = null;
      return draw();
    }
    const more = by === "tile" ? `&tile=${chosen}` : by === "text" ? `&text=${encodeURIComponent(at("text").value)}` : "";
    tell(null);
    try {
      const found = await ask(`slides/${current.number}/colours.json?${encoder()}&by=${by}${more}`);
      if (mine !== asked) return;
      colours = found.colours;
      current.cosines = found.cosines || null;
      showKey(by, found);
    } catch (error) {
      if (mine !== asked) return;
      colours = null;
      tell(error);
    }
    draw();
  }

  function showKey(by, found) {
    const image = (name, alt) => element("img", { src: `keys/${name}.png`, alt });
    if (by === "pca")
      at("key").append(image("pca", "square of colours"), element("span", { class: "quiet" },
        "component 1 to the right, 2 upwards, 3 the bar; of this slide: the same colour on another means nothing"));
    else if (by === "cluster") {
      const first = new Map();
      for (let i = 0; i < current.tiles.x.length && first.size < found.clusters.length; i += 1) {
        const colour = colours.substr(6 * i, 6);
        if (!first.has(colour)) first.set(colour, 0);
      }
      for (let i = 0; i < current.tiles.x.length; i += 1) {
        const colour = colours.substr(6 * i, 6);
        first.set(colour, first.get(colour) + 1);
      }
      for (const [colour, count] of [...first].sort((a, b) => b[1] - a[1])) {
        const spot = element("i");
        spot.style.background = "#" + colour;
        at("key").append(element("span", {}, spot, `${number(count)} tiles`));
      }
      at("key").append(element("span", { class: "quiet" }, "clusters of this slide: the same colour on another means nothing"));
    } else {
      const sorted = [...found.cosines].sort((a, b) => a - b), part = (q) => sorted[Math.round(q * (sorted.length - 1))];
      at("key").append(image("nearness", "yellow above, dark violet below"),
        element("span", {}, `cosine ${part(0.98).toFixed(3)} (yellow) to ${part(0.02).toFixed(3)}`));
    }
  }

  async function showSimilar(query, about) {
    at("similar").replaceChildren();
    at("similar-about").textContent = "Looking…";
    const mine = (showSimilar.asked = (showSimilar.asked || 0) + 1);
    try {
      const found = await ask(`similar.json?${encoder()}&count=24&${query}`);
      if (mine !== showSimilar.asked) return;
      at("similar-about").textContent = about;
      const by = encoder();
      at("similar").replaceChildren(...found.map((tile) => element("li", {}, element("button",
        { type: "button", title: `${run.slides[tile.slide].id}, ${tile.x}, ${tile.y}`, onclick: () => go(tile) },
        small(`slides/${tile.slide}/tiles/${tile.row}.jpg?${by}`),
        `${tile.score.toFixed(3)} ${run.slides[tile.slide].id}`))));
    } catch (error) {
      if (mine === showSimilar.asked) at("similar-about").textContent = error.message;
    }
  }

  function tileAt(x, y) {
    const tiles = current && current.tiles;
    if (!tiles) return null;
    let found = null, least = Infinity;
    for (let index = 0; index < tiles.x.length; index += 1) {
      const right = x - tiles.x[index], down = y - tiles.y[index];
      if (right < 0 || down < 0 || right >= tiles.side || down >= tiles.side) continue;
      const away = Math.abs(right - tiles.side / 2) + Math.abs(down - tiles.side / 2); // overlapping: the most central
      if (away < least) [found, least] = [index, away];
    }
    return found;
  }

  function choose(index) {
    chosen = index;
    if (index !== null && current.tiles.embedded) {
      if (at("by").value === "tile") recolour();
      showSimilar(`slide=${current.number}&tile=${index}`, `those most like tile ${number(index)} of ${run.slides[current.number].id}, by cosine`);
    }
    draw();
  }

  async function go(tile) {
    if (tile.slide !== current.number) await show(tile.slide);
    const side = current.tiles.side;
    eye = { x: tile.x + side / 2, y: tile.y + side / 2, zoom: Math.min(2, canvas.clientWidth / side / 4) };
    chosen = tileAt(eye.x, eye.y);
    draw();
  }

  // ---- the run

  async function show(index) {
    const kept = encoder();
    tell(null);
    wanted = [];
    current = { number: index };
    colours = chosen = tissue = null;
    history.replaceState(null, "", `#${index}`);
    for (const button of at("slides").querySelectorAll("button"))
      button.toggleAttribute("aria-current", Number(button.dataset.number) === index);
    at("name").textContent = run.slides[index].id;
    at("about").textContent = "…";
    at("problems").replaceChildren();
    draw();
    try {
      const found = await ask(`slides/${index}/slide.json?${kept}`);
      if (current.number !== index) return;
      current = { number: index, ...found };
      at("about").textContent = [found.text, found.tiles ? found.tiles.text : "no tiles"].filter(Boolean).join(" · ");
      const problems = [...run.slides[index].problems, ...found.problems];
      at("problems").replaceChildren(...[...new Set(problems)].map((text) => element("p", { class: "warning" }, text)));
      at("by").disabled = !(current.tiles && current.tiles.embedded);
      seeAll();
      await Promise.all([recolour(), findTissue()]);
    } catch (error) { tell(error); }
  }

  async function findTissue() {
    if (!at("tissue").checked || tissue || !current || !current.tiles || !current.pixels) return draw();
    const index = current.number;
    try {
      const found = await ask(`slides/${index}/tissue.json?${encoder()}`);
      if (current.number === index) tissue = found;
    } catch (error) { tell(error); }
    draw();
  }

  function list() {
    const words = at("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = run.slides.map((slide, index) => [slide, index])
      .filter(([slide]) => words.every((word) => slide.id.toLowerCase().includes(word)));
    at("count").textContent = fits.length > MOST_LISTED
      ? `${number(MOST_LISTED)} of ${number(fits.length)} slides: find others by name` : `${number(fits.length)} slide${fits.length === 1 ? "" : "s"}`;
    at("slides").replaceChildren(...fits.slice(0, MOST_LISTED).map(([slide, index]) => {
      const note = slide.gone ? "the file is gone" : slide.state === "failed" ? "failed" : slide.tiles === null ? slide.state : `${number(slide.tiles)} tiles`;
      const made = element("button", { type: "button", "data-number": index, title: slide.problems.join("\n"), onclick: () => show(index) },
        slide.gone ? empty() : small(`slides/${index}/image_files/7/0_0.jpg`),
        element("span", {}, element("span", { class: "name" }, slide.id), element("br"),
          element("span", { class: slide.gone || slide.state === "failed" ? "error" : "quiet" }, note)));
      made.toggleAttribute("aria-current", Boolean(current) && current.number === index);
      return element("li", {}, made);
    }));
  }

  // ---- hands

  let held = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held = { x: event.offsetX, y: event.offsetY, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!current || !current.size) return;
    if (held) {
      if (Math.hypot(event.offsetX - held.x, event.offsetY - held.y) > 3) held.moved = true;
      if (!held.moved) return;
      eye.x -= (event.offsetX - held.x) / eye.zoom;
      eye.y -= (event.offsetY - held.y) / eye.zoom;
      Object.assign(held, { x: event.offsetX, y: event.offsetY });
      return draw();
    }
    const [x, y] = onSlide(event.offsetX, event.offsetY), tile = tileAt(x, y);
    const score = tile !== null && colours && current.cosines ? `, cosine ${current.cosines[tile].toFixed(3)}` : "";
    at("place").textContent = `${Math.floor(x)}, ${Math.floor(y)}${tile === null ? "" : ` · tile ${number(tile)}${score}`}`;
  });
  canvas.addEventListener("pointerup", (event) => {
    if (held && !held.moved && current && current.size) choose(tileAt(...onSlide(event.offsetX, event.offsetY)));
    held = null;
  });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("dblclick", (event) => zoomBy(2, event.offsetX, event.offsetY));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(2 ** (-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) { eye.x += (move[0] * 80) / eye.zoom; eye.y += (move[1] * 80) / eye.zoom; draw(); }
    else if (event.key === "+" || event.key === "=") zoomBy(1.5);
    else if (event.key === "-") zoomBy(1 / 1.5);
    else if (event.key === "0") seeAll();
    else return;
    event.preventDefault();
  });
  new ResizeObserver(draw).observe(canvas);
  at("find").addEventListener("input", list);
  at("by").addEventListener("change", recolour);
  at("encoder").addEventListener("change", () => { offerTexts(); if (current) show(current.number); });
  at("strength").addEventListener("input", draw);
  at("grid").addEventListener("change", draw);
  at("tissue").addEventListener("change", findTissue);
  at("words").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = at("text").value.trim();
    if (!text) return;
    recolour();
    showSimilar(`text=${encodeURIComponent(text)}`, `those nearest to “${text}”, by cosine`);
  });

  ask("run.json").then((found) => {
    run = found;
    at("run").textContent = run.directory;
    document.title = `${run.directory} – slide2vec view`;
    at("encoder").replaceChildren(...run.encoders.map((name, index) => element("option", { value: index }, name)));
    at("encoders").hidden = run.encoders.length < 2;
    offerTexts();
    if (!run.encoders.length) at("similar-about").textContent = "The run has no embeddings of tiles to compare by.";
    list();
    const first = Number(location.hash.slice(1));
    return run.slides.length ? show(run.slides[first] ? first : 0) : undefined;
  }).catch(tell);
})();
