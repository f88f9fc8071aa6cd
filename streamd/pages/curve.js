// A curve over the last minutes: its name, the present value, the highest, and a line.

const SVG = "http://www.w3.org/2000/svg";
export const SECONDS = 300;
const HEIGHT = 60;

export class Curve {
  // show: a number as people read it. points: [seconds, value], oldest first, as kept from before.
  constructor(place, name, show, points) {
    this.show = show;
    this.points = points;
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    this.now = document.createElement("b");
    this.most = document.createElement("span");
    this.most.className = "most";
    caption.append(name, this.now, this.most);
    const drawing = document.createElementNS(SVG, "svg");
    drawing.setAttribute("viewBox", `0 0 ${SECONDS} ${HEIGHT}`);
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("aria-hidden", "true"); // the caption says the figures
    this.line = document.createElementNS(SVG, "polyline");
    drawing.append(this.line);
    figure.append(caption, drawing);
    place.append(figure);
  }

  add(seconds, value) {
    this.points.push([seconds, value]);
    while (this.points[0][0] < seconds - SECONDS) this.points.shift();
    const most = Math.max(...this.points.map((point) => point[1]));
    const scale = most > 0 ? (HEIGHT - 4) / most : 0;
    const drawn = this.points.map(([at, each]) => `${(SECONDS - (seconds - at)).toFixed(1)},${(HEIGHT - 2 - each * scale).toFixed(1)}`);
    this.line.setAttribute("points", drawn.join(" "));
    this.now.textContent = this.show(value);
    this.most.textContent = `highest ${this.show(most)}`;
  }
}
