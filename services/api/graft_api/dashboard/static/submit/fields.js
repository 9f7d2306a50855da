// The fields of a job, by their dotted names; defaults and choices are read from the service's own OpenAPI document.

/** Groups of fields as they are shown; `more` is folded away at first. */
export const GROUPS = [
  {
    title: "Base and data",
    fields: [
      { name: "base_model", label: "Base model", list: "models", hint: "As GET /models lists it." },
      { name: "dataset.file", label: "Dataset", kind: "file" },
      { name: "validation.split", label: "Held out", placeholder: "none", hint: "A share of the rows, such as 0.05." },
      { name: "name", label: "Name", placeholder: "none" },
    ],
  },
  {
    title: "Adapter",
    fields: [
      { name: "lora.r", label: "Rank" },
      { name: "lora.lora_alpha", label: "Alpha" },
      { name: "lora.lora_dropout", label: "Dropout" },
      { name: "lora.target_modules", label: "Target modules", hint: "auto, all-linear, or names with commas." },
    ],
  },
  {
    title: "Training",
    fields: [
      { name: "training.num_train_epochs", label: "Epochs" },
      { name: "training.max_steps", label: "At most steps", placeholder: "by epochs" },
      { name: "training.learning_rate", label: "Learning rate" },
      { name: "training.max_length", label: "Longest row", hint: "In tokens; longer rows are cut." },
      { name: "training.per_device_train_batch_size", label: "Batch size" },
      { name: "training.gradient_accumulation_steps", label: "Batches an update" },
    ],
  },
  {
    title: "More",
    more: true,
    fields: [
      { name: "gpu.class", label: "GPU class", list: "classes" },
      { name: "priority", label: "Priority" },
      { name: "training.lr_scheduler_type", label: "Schedule" },
      { name: "training.warmup_ratio", label: "Warm-up" },
      { name: "training.weight_decay", label: "Weight decay" },
      { name: "training.optim", label: "Optimizer" },
      { name: "training.packing", label: "Packing" },
      { name: "training.gradient_checkpointing", label: "Gradient checkpointing" },
      { name: "training.seed", label: "Seed" },
      { name: "training.eval_steps", label: "Evaluate every" },
      { name: "training.save_steps", label: "Save every" },
      { name: "training.early_stopping_patience", label: "Patience", placeholder: "none" },
      { name: "quantization.load_in_4bit", label: "4-bit base" },
      { name: "quantization.bnb_4bit_use_double_quant", label: "Double quantisation" },
      { name: "dataset.hub", label: "Dataset of the hub", placeholder: "none", hint: "Instead of a file: org/name." },
      { name: "webhook_url", label: "Webhook", placeholder: "none" },
    ],
  },
];

/** What the OpenAPI document says of a field: the types that it takes, its choices, and what it is left alone. */
export function described(schemas, name) {
  const [section, key] = name.includes(".") ? name.split(".") : [null, name];
  const job = schemas.JobSpec.properties;
  const property = section ? partOf(schemas, job[section]).properties[key] : job[name];
  const kinds = (property.anyOf ?? [property]).map((kind) => resolved(schemas, kind));
  return {
    types: new Set(kinds.map((kind) => kind.type)),
    choices: kinds.length === 1 ? (kinds[0].enum ?? (kinds[0].type === "boolean" ? ["true", "false"] : null)) : null,
    usual: section ? job[section].default?.[key] : property.default,
  };
}

/** What was typed, as the type that the field takes. */
export function parsed(text, { types }) {
  if (types.has("boolean") && ["true", "false"].includes(text)) return text === "true";
  if ((types.has("number") || types.has("integer")) && text !== "" && Number.isFinite(Number(text)))
    return Number(text);
  if (types.has("array") && !["auto", "all-linear"].includes(text))
    return text
      .split(",")
      .map((part) => part.trim())
      .filter(Boolean);
  return text;
}

/** A spec of what was filled in; everything else is left to the service. */
export function specOf(values) {
  const spec = {};
  for (const [name, value] of Object.entries(values)) {
    const [section, key] = name.includes(".") ? name.split(".") : [null, name];
    if (section) (spec[section] ??= {})[key] = value;
    else spec[name] = value;
  }
  return spec;
}

const resolved = (schemas, kind) => (kind.$ref ? schemas[kind.$ref.split("/").at(-1)] : kind);

const partOf = (schemas, property) =>
  (property.anyOf ?? [property]).map((kind) => resolved(schemas, kind)).find((kind) => kind.properties);
