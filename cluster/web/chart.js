// A small line chart: SVG for the lines, text for the rest, so that both stay sharp and readable.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600;
const HEIGHT = 130;

// The next of 1, 2, 5, 10, ... at or above a value: an axis's end.
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.999);
}

export class Chart {
  // `names` are the lines', `format` makes a value's text, `fixed` ends the axis where given.
  constructor(place, title, names, format, fixed = 0) {
    this.names = names;
    this.format = format;
    this.fixed = fixed;
    const box = document.createElement("section");
    box.className = "chart";
    const head = document.createElement("h2");
    this.span = document.createElement("small");
    head.append(title, this.span);
    const plot = document.createElement("div");
    plot.className = "plot";
    this.labels = ["top", "mid", "low"].map((name) => {
      const label = document.createElement("span");
      label.className = name;
      plot.append(label);
      return label;
    });
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    this.svg = svg;
    this.title = title;
    for (const y of [0, HEIGHT / 2, HEIGHT]) {
      const line = document.createElementNS(SVG, "line");
      for (const [name, value] of [["x1", 0], ["x2", WIDTH], ["y1", y], ["y2", y]]) line.setAttribute(name, value);
      svg.append(line);
    }
    const path = (name) => {
      const made = document.createElementNS(SVG, "path");
      made.setAttribute("class", name);
      svg.append(made);
      return made;
    };
    this.area = path("area");
    this.paths = names.map((_, i) => path(`c${i}`));
    this.legend = document.createElement("p");
    this.legend.className = "legend";
    plot.append(svg);
    box.append(head, plot, this.legend);
    place.append(box);
  }

  // `rows` holds one array of values a line, oldest first; null where nothing is known. `room` is
  // how many fit, and `span` says how long that is.
  draw(rows, room, span) {
    this.span.textContent = span;
    const seen = rows.flat().filter((value) => value !== null);
    const top = this.fixed || ceiling(Math.max(0, ...seen));
    const x = (i, count) => WIDTH - (count - 1 - i) * (WIDTH / (room - 1));
    const y = (value) => HEIGHT - Math.min(1, value / top) * HEIGHT;
    rows.forEach((values, line) => {
      let drawn = "";
      let pen = "M";
      values.forEach((value, i) => {
        if (value === null) {
          pen = "M";
          return;
        }
        drawn += `${pen}${x(i, values.length).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
      });
      this.paths[line].setAttribute("d", drawn);
      if (!line) {
        const whole = drawn && !values.includes(null);
        this.area.setAttribute("d", whole ? `${drawn}V${HEIGHT}H${x(0, values.length).toFixed(1)}Z` : "");
      }
    });
    [top, top / 2, 0].forEach((value, i) => { this.labels[i].textContent = this.format(value); });
    this.legend.replaceChildren(...this.names.map((name, i) => {
      const item = document.createElement("span");
      const dot = document.createElement("i");
      dot.className = `c${i}`;
      const value = rows[i].at(-1) ?? null;
      item.append(dot, `${name} ${value === null ? "–" : this.format(value)}`);
      return item;
    }));
    this.svg.setAttribute("aria-label", `${this.title}: ${this.legend.textContent}`);
  }
}
