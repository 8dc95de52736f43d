/** When a failed call is worth another try, and after how long: the rules of the Python client. */

import { setTimeout as sleep } from "node:timers/promises";

import { ServerError } from "./errors.js";

/**
 * Exponential backoff with full jitter: before try n + 1, a random wait of up to min(longestMs, firstMs · 2ⁿ⁻¹).
 *
 * Tried again are calls that found nobody (UNAVAILABLE) or a full queue (RESOURCE_EXHAUSTED with RetryInfo, which is
 * waited out, too), and only before their first message: a text that has begun is never started over.
 */
export interface Retry {
  attempts: number;
  firstMs: number;
  longestMs: number;
}

export const DEFAULT_RETRY: Retry = { attempts: 5, firstMs: 100, longestMs: 5_000 };
export const NEVER: Retry = { attempts: 1, firstMs: 0, longestMs: 0 };

/** The tries of one call, all under one deadline. */
export class Attempts {
  /** As gRPC wants it; undefined without a deadline. */
  readonly deadline: Date | undefined;
  private number = 1;
  private earlier: ServerError | undefined;

  constructor(
    private readonly retry: Retry,
    timeoutMs: number | undefined,
    private readonly signal: AbortSignal | undefined,
  ) {
    this.deadline = timeoutMs === undefined ? undefined : new Date(Date.now() + timeoutMs);
  }

  /** Waits for the next try's time; throws `error` when there is to be none. */
  async again(error: unknown): Promise<void> {
    if (!(error instanceof ServerError)) throw error;
    error.attempts = this.number;
    if (this.number >= this.retry.attempts || !worthIt(error, this.earlier)) throw error;
    const most = Math.min(this.retry.longestMs, this.retry.firstMs * 2 ** (this.number - 1));
    const wait = (error.retryAfterS ?? 0) * 1000 + Math.random() * most;
    if (this.deadline && Date.now() + wait >= this.deadline.getTime()) throw error;
    await sleep(wait, undefined, this.signal ? { signal: this.signal } : {});
    this.earlier = error;
    this.number += 1;
  }
}

function worthIt(error: ServerError, earlier: ServerError | undefined): boolean {
  switch (error.code) {
    case "UNAVAILABLE":
      return true;
    case "RESOURCE_EXHAUSTED":
      return error.retryAfterS !== undefined;
    case "ALREADY_EXISTS":
      // A lost connection leaves the name in use until the server has noticed: our own earlier try is in the way.
      return earlier?.code === "UNAVAILABLE" || earlier?.code === "ALREADY_EXISTS";
    default:
      return false;
  }
}
