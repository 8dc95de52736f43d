export { Client, Collector, type CallOptions, type ClientOptions, type Completion, type Event } from "./client.js";
export { ServerError, type Code, type FieldViolation } from "./errors.js";
export type { ChatMessage, Delta, Finished, GetModelInfoResponse, Started } from "./gen/dspark/v1/generation.js";
export type { ChatPrompt, Options, Prompt } from "./request.js";
export { DEFAULT_RETRY, NEVER, type Retry } from "./retry.js";
