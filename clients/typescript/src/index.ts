export { Client, Collector, type CallOptions, type ClientOptions, type Completion, type Event } from "./client.js";
export type { ConnectionOptions, Tls } from "./connection.js";
export { ServerError, type Code, type FieldViolation } from "./errors.js";
export type {
  ChatMessage,
  Delta,
  Finished,
  GetModelInfoResponse,
  Started,
  TokenizeResponse,
} from "./gen/dspark/v1/generation.js";
export type { GetPolicyResponse, Policy, RequestRecord, RoundRecord } from "./gen/dspark/v1/scheduler.js";
export type { ChatPrompt, Options, Prompt } from "./request.js";
export { DEFAULT_RETRY, NEVER, type Retry } from "./retry.js";
export { SchedulerClient, type Batch, type SchedulerCallOptions, type WatchOptions } from "./scheduler.js";
