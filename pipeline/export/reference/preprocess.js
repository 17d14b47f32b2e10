// Refract's preprocessing in JavaScript: decoded pixels become the input of an exported network. `preprocess.json` has its settings.
// Works in browsers and in Node, without packages. docs/preprocessing.md of Refract has the specification and the bounds of the differences.
//
//   const bitmap = await createImageBitmap(file);                       // applies the EXIF orientation and the colour profile
//   const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
//   const context = canvas.getContext("2d");
//   context.drawImage(bitmap, 0, 0);
//   const input = refractPreprocess(context.getImageData(0, 0, canvas.width, canvas.height), settings);   // Uint8Array, H×W×3

"use strict";

// image: {data, width, height}, rows from top to bottom, 3 (RGB) or 4 (RGBA) values in 0…255 a pixel; settings: of preprocess.json.
// Returns a Uint8Array with height × width × 3 values.
function refractPreprocess(image, settings) {
  const { height, width, resize, crop_ratio: cropRatio, interpolation = "refract" } = settings.preprocess;
  let pixels = refractRgb(image), rows = image.height, columns = image.width;
  if (interpolation !== "refract") return refractByPillow(pixels, rows, columns, settings.preprocess);
  let down, across, top = 0, left = 0;
  if (resize === "squash") { // the whole image
    down = rows / height;
    across = columns / width;
  } else { // the centre, of the result's aspect ratio
    down = across = cropRatio * Math.min(rows / height, columns / width);
    top = (rows - down * height) / 2;
    left = (columns - across * width) / 2;
  }
  let halveDown = refractPowerOfTwo(down), halveAcross = refractPowerOfTwo(across);
  const box = [top, left, top + down * height, left + across * width];
  const whole = box.every((edge) => Math.abs(edge - Math.round(edge)) < 1e-4);
  // With whole pixels and no reduction nothing beyond the box is read; else the whole image is.
  let firstRow = 0, firstColumn = 0, lastRow = rows - 1, lastColumn = columns - 1;
  if (whole && halveDown === 1 && halveAcross === 1) {
    [firstRow, firstColumn] = [Math.round(top), Math.round(left)];
    [lastRow, lastColumn] = [Math.round(box[2]) - 1, Math.round(box[3]) - 1];
    [top, left] = [firstRow, firstColumn];
  }
  let stride = columns;
  if (halveDown > 1 || halveAcross > 1) {
    const padded = refractPad(pixels, rows, columns, Math.ceil(rows / halveDown) * halveDown, Math.ceil(columns / halveAcross) * halveAcross);
    ({ pixels, rows, columns } = padded);
    while (halveDown > 1 || halveAcross > 1) { // means of boxes, against aliasing
      const v = Math.min(halveDown, 2), h = Math.min(halveAcross, 2);
      pixels = refractMeans(pixels, rows, columns, v, h);
      rows /= v; columns /= h; halveDown /= v; halveAcross /= h;
      down /= v; top /= v; across /= h; left /= h;
    }
    [lastRow, lastColumn, stride] = [rows - 1, columns - 1, columns];
  }
  const vertical = refractNeighbours(height, down, top, firstRow, lastRow);
  const horizontal = refractNeighbours(width, across, left, firstColumn, lastColumn);
  const result = new Uint8Array(height * width * 3);
  let index = 0;
  for (const [upper, lower, y] of vertical) {
    for (const [before, after, x] of horizontal) {
      for (let channel = 0; channel < 3; channel++) {
        const at = (row, column) => pixels[(row * stride + column) * 3 + channel];
        const above = at(upper, before) * (1 - x) + at(upper, after) * x;
        const below = at(lower, before) * (1 - x) + at(lower, after) * x;
        result[index++] = Math.floor(above * (1 - y) + below * y + 0.5);
      }
    }
  }
  return result;
}

// The input as Pillow resizes. A pixel may differ by one level: Pillow's releases and torchvision's tensors round in different orders.
function refractByPillow(pixels, rows, columns, { height, width, resize, crop_ratio: cropRatio }) {
  let newRows = height, newColumns = width;
  if (resize !== "squash") {
    const goalRows = Math.floor(height / cropRatio), goalColumns = Math.floor(width / cropRatio), shorter = Math.min(rows, columns);
    const ratio = Math.min(rows / goalRows, columns / goalColumns);
    const scaled = (side) => side === shorter ? goalRows : Math.floor(goalRows * side / shorter);
    [newRows, newColumns] = [rows, columns].map(goalRows === goalColumns ? scaled : (side) => refractRound(side / ratio));
  }
  const across = refractWeights(columns, newColumns, refractRound((newColumns - width) / 2), width);
  const down = refractWeights(rows, newRows, refractRound((newRows - height) / 2), height);
  const narrow = refractWeigh(pixels, across, rows, columns * 3, 3, width * 3, 3);
  return refractWeigh(narrow, down, width, 3, width * 3, 3, width * 3);
}

// For each of `count` output pixels from `start`: the first input pixel and the weights from there, in units of 2⁻²², as Pillow has them.
function refractWeights(size, newSize, start, count) {
  const scale = size / newSize, support = Math.max(scale, 1), factor = 1 / support;
  return Array.from({ length: count }, (_, index) => {
    const centre = (start + index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5)), last = Math.min(size, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: last - first }, (_, at) => Math.max(0, 1 - Math.abs((at + first - centre + 0.5) * factor)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return [first, weights.map((weight) => Math.trunc(weight / sum * 2 ** 22 + 0.5))];
  });
}

// The weighted sums along each of `lines` lines of pixels. The steps are distances in the arrays: between lines, and between pixels of a line.
function refractWeigh(pixels, weights, lines, lineStep, pixelStep, newLineStep, newPixelStep) {
  const result = new Uint8Array(lines * weights.length * 3);
  for (let line = 0; line < lines; line++) {
    weights.forEach(([first, factors], index) => {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** 21, at = line * lineStep + first * pixelStep + channel;
        for (const factor of factors) { sum += pixels[at] * factor; at += pixelStep; }
        result[line * newLineStep + index * newPixelStep + channel] = Math.min(255, Math.floor(sum / 2 ** 22));
      }
    });
  }
  return result;
}

// The nearest whole number; of two, the even one.
function refractRound(value) {
  const nearest = Math.round(value);
  return Math.abs(nearest - value) === 0.5 && nearest % 2 !== 0 ? nearest - 1 : nearest;
}

// The two pixels between which each output pixel lies, and its distance from the first. Pixel i has its centre at i + 0.5.
function refractNeighbours(count, step, start, first, last) {
  const clamp = (value) => Math.min(Math.max(value, first), last);
  return Array.from({ length: count }, (_, index) => {
    const centre = (index + 0.5) * step + start - 0.5, floor = Math.floor(centre);
    return [clamp(floor), clamp(floor + 1), centre - floor];
  });
}

// The largest power of two that is at most `step`, at least 1.
function refractPowerOfTwo(step) {
  return Math.max(1, 2 ** Math.floor(Math.log2(Math.max(1, Math.floor(step + 1e-6)))));
}

// RGB of RGB or RGBA pixels; transparent pixels are laid over white.
function refractRgb({ data, width, height }) {
  const count = width * height, values = data.length / count, rgb = new Uint8Array(count * 3);
  if (values !== 3 && values !== 4) {
    throw new RangeError(`the image has ${data.length} values for ${width}×${height} pixels: expected 3 or 4 for each`);
  }
  for (let pixel = 0; pixel < count; pixel++) {
    const alpha = values === 4 ? data[pixel * 4 + 3] / 255 : 1;
    for (let channel = 0; channel < 3; channel++) {
      rgb[pixel * 3 + channel] = Math.round(data[pixel * values + channel] * alpha + 255 * (1 - alpha));
    }
  }
  return rgb;
}

// The image with its last row and column repeated.
function refractPad(pixels, rows, columns, newRows, newColumns) {
  const result = new Uint8Array(newRows * newColumns * 3);
  for (let row = 0; row < newRows; row++) {
    for (let column = 0; column < newColumns; column++) {
      const from = (Math.min(row, rows - 1) * columns + Math.min(column, columns - 1)) * 3;
      result.set(pixels.subarray(from, from + 3), (row * newColumns + column) * 3);
    }
  }
  return { pixels: result, rows: newRows, columns: newColumns };
}

// The rounded means of boxes of v × h pixels.
function refractMeans(pixels, rows, columns, v, h) {
  const result = new Uint8Array((rows / v) * (columns / h) * 3);
  let index = 0;
  for (let row = 0; row < rows; row += v) {
    for (let column = 0; column < columns; column += h) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let dy = 0; dy < v; dy++) {
          for (let dx = 0; dx < h; dx++) sum += pixels[((row + dy) * columns + column + dx) * 3 + channel];
        }
        result[index++] = Math.floor((sum + (v * h) / 2) / (v * h));
      }
    }
  }
  return result;
}

if (typeof module !== "undefined") module.exports = { refractPreprocess };
