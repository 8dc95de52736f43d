/** The scheduler of a running server: watch its rounds, read and change its policy. */

import type { Client } from "./client.js";
import { toError } from "./errors.js";
import {
  SchedulerServiceClient,
  type GetPolicyResponse,
  type Policy,
  type RoundRecord,
} from "./gen/dspark/v1/scheduler.js";

/** Records that came together, oldest first, and how many before them this client was too slow for. */
export interface Batch {
  records: RoundRecord[];
  lost: bigint;
}

/** What to watch; what is absent is left to the server. */
export interface WatchOptions {
  /** Only rounds whose number is a multiple of this. */
  every?: number;
  /** Begin with so many of the rounds before the call. */
  history?: number;
  /** Records that the server holds for a slow reader. */
  buffer?: number;
  /** Leave out what each request did. */
  summaries?: boolean;
}

export interface SchedulerCallOptions {
  timeoutMs?: number;
  signal?: AbortSignal;
}

/** Calls SchedulerService over a client's connection. Every method throws ServerError. */
export class SchedulerClient {
  private readonly stub: SchedulerServiceClient;

  constructor(private readonly client: Client) {
    this.stub = client.open(SchedulerServiceClient);
  }

  /** Streams records of rounds, until the server ends it. Leaving the loop ends the call. */
  async *watch(options: WatchOptions = {}, call: SchedulerCallOptions = {}): AsyncGenerator<Batch, void, void> {
    const request = { requestId: "", every: 1, history: 0, summaries: false, ...options };
    const signal = this.client.signalOf(call);
    signal.throwIfAborted();
    const stream = this.stub.watchRounds(request, this.client.metadata, deadline(call));
    const cancel = (): void => stream.cancel();
    stream.on("error", () => {}); // a stream that nobody reads any more still reports that it was cancelled
    signal.addEventListener("abort", cancel, { once: true });
    try {
      for await (const { records, lost } of stream) yield { records, lost } as Batch;
    } catch (error) {
      signal.throwIfAborted();
      throw toError(error);
    } finally {
      signal.removeEventListener("abort", cancel);
      stream.cancel();
    }
  }

  /** What decides now, what the server was started with, and what may be chosen. */
  async policy(call: SchedulerCallOptions = {}): Promise<GetPolicyResponse> {
    return this.client.unary(this.stub.getPolicy.bind(this.stub), { requestId: "" }, call);
  }

  /** Sets `changes`, and sets the fields of `reset` to what the server was started with; returns the whole policy. */
  async updatePolicy(
    changes: Partial<Policy>,
    reset: readonly (keyof Policy)[] = [],
    call: SchedulerCallOptions = {},
  ): Promise<Policy> {
    const updateMask = reset.length ? [...Object.keys(changes), ...reset].map(snake) : undefined;
    const request = { requestId: "", policy: changes, updateMask };
    const answer = await this.client.unary(this.stub.updatePolicy.bind(this.stub), request, call);
    return answer.policy ?? {};
  }
}

function deadline(call: SchedulerCallOptions): { deadline?: Date } {
  return call.timeoutMs === undefined ? {} : { deadline: new Date(Date.now() + call.timeoutMs) };
}

/** A field's name on the wire. */
function snake(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}
