/** What the command line shows. */

import type { Completion } from "./client.js";
import type { ServerError } from "./errors.js";
import { FinishReason } from "./gen/dspark/v1/generation.js";

/** The same names as the Python command line's. */
export function asJson(completion: Completion): object {
  const { usage, speculation, reason } = completion.finished;
  return {
    text: completion.text,
    token_ids: completion.tokenIds,
    finish_reason: FinishReason[reason].toLowerCase(),
    usage: {
      prompt_tokens: usage?.promptTokens,
      completion_tokens: usage?.completionTokens,
      cached_tokens: usage?.cachedTokens,
    },
    speculation: {
      rounds: speculation?.rounds,
      drafted: speculation?.drafted,
      verified: speculation?.verified,
      accepted: speculation?.accepted,
      mean_accepted_length: speculation?.meanAcceptedLength,
    },
    timing: { ttft_s: completion.ttftMs / 1e3, total_s: completion.totalMs / 1e3 },
  };
}

export function facts(completion: Completion): string {
  const { usage, speculation } = completion.finished;
  const speed = completion.tokenIds.length / (completion.totalMs / 1000);
  return (
    `[${usage?.completionTokens} tokens, ${usage?.cachedTokens} of ${usage?.promptTokens} prompt tokens cached,` +
    ` mean accepted length ${speculation?.meanAcceptedLength.toFixed(2)}, ${speed.toFixed(0)} tokens/s]`
  );
}

export function errorLines(error: ServerError): string {
  const lines = error.violations.map((violation) => `  ${violation.field}: ${violation.description}`);
  return [`error: ${error.code}${lines.length ? "" : `: ${error.details}`}`, ...lines].join("\n");
}

/** For JSON.stringify, which knows no 64-bit numbers. */
export function plain(_: string, value: unknown): unknown {
  return typeof value === "bigint" ? Number(value) : value;
}
