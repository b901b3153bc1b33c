// The columns the trainer has sent so far, kept in step with its bounded history. Knows no page.

/** Values a chart can place: a finite number, or null for a gap. */
const placeable = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);

export class History {
  constructor() {
    this.clear();
  }

  clear() {
    this.next = 0;
    this.time = [];
    this.columns = new Map();
    this.validation = new Map();
    this.validationSteps = [];
    this.validationNames = [];
  }

  get length() {
    return this.time.length;
  }

  /** A column by name; all gaps when the trainer does not send it. */
  column(name) {
    return this.columns.get(name) ?? new Array(this.length).fill(null);
  }

  has(name) {
    return (this.columns.get(name) ?? []).some((value) => value !== null);
  }

  /**
   * Takes over one answer of `/api/live`: replaces everything when it says `reset`, appends otherwise.
   * Throws when columns differ in length, because then values would be drawn at wrong times.
   */
  apply(answer) {
    const { time, ...columns } = answer.series;
    for (const [name, values] of Object.entries(columns)) {
      if (values.length !== time.length) {
        throw new Error(`column ${name} has ${values.length} values for ${time.length} times`);
      }
    }
    if (answer.reset) this.clear();
    const before = this.length;
    this.time.push(...time);
    for (const name of new Set([...this.columns.keys(), ...Object.keys(columns)])) {
      if (!this.columns.has(name)) this.columns.set(name, new Array(before).fill(null));
      const fresh = columns[name] ?? new Array(time.length).fill(null);
      this.columns.get(name).push(...fresh.map(placeable));
    }
    if (answer.validation_series !== null) this.replaceValidation(answer.validation_series);
    this.next = answer.next;
  }

  // Validations are few: an answer carries all of them, or null when no new one came.
  replaceValidation({ step, metrics }) {
    this.validation = new Map(Object.entries(metrics).map(([name, values]) => [name, values.map(placeable)]));
    this.validationSteps = step;
    this.validationNames = [...this.validation.keys()].filter((name) => this.validation.get(name).some((v) => v !== null));
  }

  /** A validation metric on the shared time axis: each value at the first point that reached its step. */
  validationColumn(name) {
    const placed = new Array(this.length).fill(null);
    const steps = this.column("step");
    this.validation.get(name)?.forEach((value, row) => {
      const at = value === null ? null : firstAtLeast(steps, this.validationSteps[row]);
      if (at !== null) placed[at] = value;
    });
    return placed;
  }

  /** Bias-corrected exponential mean of a column over about 1/40 of its points; gaps are carried across. */
  smoothed(name) {
    const keep = 1 - 1 / Math.max(3, this.length / 40);
    let mean = 0;
    let weight = 0;
    return this.column(name).map((value) => {
      if (value === null) return null;
      mean = keep * mean + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return mean / weight;
    });
  }
}

/** Index of the first entry ≥ wanted in a rising column; the last one when it lies just beyond; else null. */
function firstAtLeast(steps, wanted) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((steps[middle] ?? -1) < wanted) low = middle + 1;
    else high = middle;
  }
  if (steps.length === 0 || (low === 0 && (steps[0] ?? -1) > wanted)) return null;
  return Math.min(low, steps.length - 1);
}
