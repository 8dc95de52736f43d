/** What a caller asks, and how it goes on the wire. */

import {
  GenerateRequest,
  Sampling,
  Speculation,
  SpeculationMode,
  Verification,
  type ChatMessage,
  type TokenizeRequest,
} from "./gen/dspark/v1/generation.js";

/** A conversation, rendered by the server with the model's own template. */
export interface ChatPrompt {
  messages: readonly ChatMessage[];
  templateArguments?: Record<string, unknown>;
}

/** Text, token ids, or a conversation. */
export type Prompt = string | readonly number[] | ChatPrompt;

/** How to generate; what is absent is left to the model or the server. */
export interface Options {
  maxTokens?: number;
  minTokens?: number;
  temperature?: number;
  topK?: number;
  topP?: number;
  minP?: number;
  repetitionPenalty?: number;
  presencePenalty?: number;
  frequencyPenalty?: number;
  logitBias?: Record<number, number>;
  seed?: bigint | number;
  stop?: readonly string[];
  stopTokenIds?: readonly number[];
  ignoreEos?: boolean;
  logprobs?: number;
  speculation?: "off" | "fixed" | "threshold" | "auto";
  draftTokens?: number;
  confidenceThreshold?: number;
  maxDraftTokens?: number;
  verification?: "rejection" | "coupled";
  priority?: number;
  minTokensPerS?: number;
  cacheSalt?: string;
}

const MODES = {
  off: SpeculationMode.OFF,
  fixed: SpeculationMode.FIXED,
  threshold: SpeculationMode.THRESHOLD,
  auto: SpeculationMode.AUTO,
};
const VERIFICATIONS = { rejection: Verification.REJECTION, coupled: Verification.COUPLED };

/** The request message. Throws RangeError for a seed that is no unsigned whole number of 64 bits. */
export function toWire(prompt: Prompt, options: Options, requestId: string): GenerateRequest {
  const { seed, speculation, verification } = options;
  return GenerateRequest.fromPartial({
    requestId,
    prompt: promptToWire(prompt),
    sampling: Sampling.fromPartial({
      ...pick(options, ["temperature", "topK", "topP", "minP"]),
      ...pick(options, ["repetitionPenalty", "presencePenalty", "frequencyPenalty", "logitBias"]),
      ...(seed === undefined ? {} : { seed: toUint64(seed) }),
    }),
    speculation: Speculation.fromPartial({
      ...pick(options, ["draftTokens", "confidenceThreshold", "maxDraftTokens"]),
      ...(speculation === undefined ? {} : { mode: MODES[speculation] }),
      ...(verification === undefined ? {} : { verification: VERIFICATIONS[verification] }),
    }),
    stop: [...(options.stop ?? [])],
    stopTokenIds: [...(options.stopTokenIds ?? [])],
    ...pick(options, ["maxTokens", "minTokens", "ignoreEos", "logprobs", "priority", "minTokensPerS", "cacheSalt"]),
  });
}

function promptToWire(prompt: Prompt): NonNullable<GenerateRequest["prompt"]> {
  if (typeof prompt === "string" || "messages" in prompt) return textToWire(prompt);
  return { $case: "tokenIds", value: { ids: [...prompt] } };
}

/** What has no token ids yet. */
export function textToWire(prompt: string | ChatPrompt): NonNullable<TokenizeRequest["input"]> {
  if (typeof prompt === "string") return { $case: "text", value: prompt };
  const { messages, templateArguments } = prompt;
  return { $case: "chat", value: { messages: [...messages], templateArguments } };
}

function pick<T extends object, K extends keyof T>(from: T, names: readonly K[]): Partial<Pick<T, K>> {
  const taken: Partial<Pick<T, K>> = {};
  for (const name of names) if (from[name] !== undefined) taken[name] = from[name];
  return taken;
}

function toUint64(seed: bigint | number): bigint {
  // A larger number has already been rounded to another seed.
  if (typeof seed === "number" && !Number.isSafeInteger(seed)) {
    throw new RangeError(`seed: ${seed} is not a whole number that a double holds exactly; give a bigint`);
  }
  const whole = BigInt(seed);
  if (whole !== BigInt.asUintN(64, whole)) throw new RangeError(`seed: ${seed} is not from 0 to 2^64 - 1`);
  return whole;
}
