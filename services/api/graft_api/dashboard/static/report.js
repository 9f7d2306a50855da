// What is learnt from data: how many tokens, how long rows are, and the first rows with their loss mask.

import { histogram } from "./bars.js";
import { h } from "./dom.js";
import { facts } from "./parts.js";
import { figure, whole } from "./words.js";

/** A report as its user reads it, but for its warnings. */
export function reportOf(report) {
  const { train, validation, lengths } = report;
  return [
    h(
      "div",
      { class: "columns" },
      facts([
        ["Rows", `${whole(report.rows)} (${report.kind})`],
        ["Trained on", `${whole(train.rows)} rows, ${whole(train.tokens)} tokens`],
        [
          "Learnt",
          `${whole(train.trained_tokens)} tokens (${percent(train.trained_tokens / Math.max(1, train.tokens))})`,
        ],
        [
          "Held out",
          validation && `${whole(validation.rows)} rows, ${whole(validation.overlap_rows)} of them trained on as well`,
        ],
        [
          "Cut",
          `${whole(report.truncated_rows)} rows (${percent(report.truncated_share)}) at ${whole(report.max_length)} tokens`,
        ],
        ["Duplicates", whole(report.duplicate_rows)],
        ["Nothing to learn", whole(report.nothing_to_learn_rows)],
      ]),
      h(
        "div",
        {},
        h("h3", {}, "Rows by length"),
        histogram(lengths.histogram, `Rows by their number of tokens; half have at most ${lengths.percentiles["50"]}`),
      ),
    ),
    ...(report.first_rows.length
      ? [
          h("h3", {}, "The first rows, as the model reads them"),
          legend(),
          h("ol", { class: "rows" }, report.first_rows.map(rowOf)),
        ]
      : []),
  ];
}

const percent = (share) => `${figure(100 * share, 3)} %`;

function legend() {
  return h(
    "p",
    { class: "muted legend" },
    h("mark", {}, "is learnt"),
    " ",
    h("span", {}, "is read only"),
    " ",
    h("s", {}, "is cut off"),
  );
}

function rowOf({ line, tokens, spans, spans_left_out: more }) {
  return h(
    "li",
    {},
    h("span", { class: "note" }, `line ${whole(line)}, ${whole(tokens)} tokens`),
    h(
      "div",
      { class: "row-text" },
      spans.map(spanOf),
      more > 0 && h("span", { class: "muted" }, ` … ${whole(more)} more parts`),
    ),
  );
}

function spanOf({ text, trained, cut, left_out: left }) {
  const shown =
    left > 0 ? `${text.slice(0, text.length / 2)} … ${whole(left)} characters … ${text.slice(text.length / 2)}` : text;
  return h(cut ? "s" : trained ? "mark" : "span", {}, shown);
}
