// A grid of cells on a canvas, kept as pixels: a change costs what it covers, and 50,000 cells a few milliseconds.

const SIDE = { least: 3, usual: 26, most: 36 };
const MOST_HEIGHT = 460;
const ROW = 8; // cells that lie together
const CUT = 2.2; // times a cut corner's side is a cell's
const OUTLINED = 5; // pixels, from which on a cell can have an outline

export class Cells {
  constructor(number, label) {
    this.number = number;
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application");
    this.canvas.setAttribute("aria-label", label);
    this.context = this.canvas.getContext("2d");
  }

  // As many columns as a width has room for.
  layOut(width) {
    const scale = devicePixelRatio;
    const side = Math.floor(Math.sqrt((width * MOST_HEIGHT) / this.number));
    const wanted = Math.max(SIDE.least, Math.min(SIDE.usual, side));
    const rows = Math.min(Math.round(width / wanted / ROW), Math.floor(width / SIDE.least / ROW));
    this.columns = Math.max(1, rows) * ROW;
    this.step = Math.floor(scale * Math.min(SIDE.most, width / this.columns)); // in pixels
    this.side = this.step / scale;
    this.size = this.step - Math.max(1, Math.floor(this.step / 10));
    const [w, h] = [this.columns * this.step, Math.ceil(this.number / this.columns) * this.step];
    [this.canvas.width, this.canvas.height] = [w, h];
    this.canvas.style.width = `${w / scale}px`;
    this.canvas.style.height = `${h / scale}px`;
    this.image = new ImageData(w, h);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.top = h; // the rows of pixels that are not shown yet
    this.bottom = 0;
  }

  // Paint one; it is seen after `show`. What is only outlined is filled where it is too small for that.
  paint(block, colour, isOutline = false, isCut = false) {
    const { step, size, columns, pixels } = this;
    const width = this.image.width;
    const y = Math.floor(block / columns) * step;
    const isHollow = isOutline && size >= OUTLINED;
    let at = y * width + (block % columns) * step;
    for (let row = 0; row < size; row++, at += width) {
      const isEdge = row === 0 || row === size - 1;
      for (let column = 0; column < size; column++) {
        pixels[at + column] = isHollow && !isEdge && column > 0 && column < size - 1 ? 0 : colour;
      }
    }
    if (isCut) this.cutCorner(y * width + (block % columns) * step);
    if (y < this.top) this.top = y;
    if (y + step > this.bottom) this.bottom = y + step;
  }

  cutCorner(first) {
    const part = Math.max(1, Math.floor(this.size / CUT));
    for (let row = 0; row < part; row++) {
      const end = first + (this.size - 1 - row) * this.image.width + this.size;
      this.pixels.fill(0, end - part + row, end);
    }
  }

  show() {
    if (this.bottom > this.top) this.context.putImageData(this.image, 0, 0, 0, this.top, this.image.width, this.bottom - this.top);
    this.top = this.image.height;
    this.bottom = 0;
  }

  // The cell at a place on the canvas, and where a cell is.
  at = (x, y) => Math.floor(y / this.side) * this.columns + Math.floor(x / this.side);
  place = (block) => [(block % this.columns) * this.side, Math.floor(block / this.columns) * this.side];
}

// A function from a colour of CSS, and a part of it that is seen, to a pixel.
export function pixelsOf() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return (colour, part = 1) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const { data } = context.getImageData(0, 0, 1, 1);
    data[3] *= part;
    return new Uint32Array(data.buffer)[0];
  };
}

// Between two pixels: `part` of the first.
export function mixed(one, other, part) {
  let pixel = 0;
  for (let shift = 0; shift < 32; shift += 8) {
    pixel |= Math.round(part * ((one >>> shift) & 255) + (1 - part) * ((other >>> shift) & 255)) << shift;
  }
  return pixel >>> 0;
}
