/** A client of `dspark.v1`: `for await (const event of new Client("127.0.0.1:50051").generate("…")) …`. */

import { credentials, Metadata, type ChannelCredentials, type ClientReadableStream } from "@grpc/grpc-js";

import { ServerError, toError } from "./errors.js";
import {
  GenerationServiceClient,
  type Finished,
  type GenerateResponse,
  type GetModelInfoResponse,
} from "./gen/dspark/v1/generation.js";
import { toWire, type Options, type Prompt } from "./request.js";
import { Attempts, DEFAULT_RETRY, type Retry } from "./retry.js";

/** `started`, then `delta`s, then `finished`; `$case` says which. */
export type Event = NonNullable<GenerateResponse["event"]>;

export interface ClientOptions {
  /** Without it the connection is not encrypted. */
  credentials?: ChannelCredentials;
  /** Sent with every call, such as an authorization. */
  metadata?: Record<string, string>;
  retry?: Retry;
}

export interface CallOptions {
  /** Your name for the call, unique among those that run; empty: the server makes one. */
  requestId?: string;
  /** The deadline, all tries and waits together. */
  timeoutMs?: number;
  /** Ends the call; it then throws the signal's reason. */
  signal?: AbortSignal;
}

/** A whole generation. Times are the client's own. */
export interface Completion {
  text: string;
  tokenIds: number[];
  finished: Finished;
  ttftMs: number;
  totalMs: number;
}

const MAX_MESSAGE = 16 * 2 ** 20; // bytes, as the server's
// The same as the Python client's: calls are spread over all addresses of a name, dead connections are noticed.
const CHANNEL = {
  "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
  "grpc.max_receive_message_length": MAX_MESSAGE,
  "grpc.max_send_message_length": MAX_MESSAGE,
  "grpc.keepalive_time_ms": 30_000,
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.dns_min_time_between_resolutions_ms": 5_000,
  "grpc.initial_reconnect_backoff_ms": 200,
  "grpc.max_reconnect_backoff_ms": 5_000,
};

/** Calls one server, or all that a name such as `dns:///dspark-headless:50051` stands for, in turn. */
export class Client {
  private readonly stub: GenerationServiceClient;
  private readonly metadata = new Metadata();
  private readonly retry: Retry;
  private readonly closing = new AbortController();

  constructor(address: string, options: ClientOptions = {}) {
    this.stub = new GenerationServiceClient(address, options.credentials ?? credentials.createInsecure(), CHANNEL);
    for (const [name, value] of Object.entries(options.metadata ?? {})) this.metadata.set(name, value);
    this.retry = options.retry ?? DEFAULT_RETRY;
  }

  /** Cancels what runs, and disconnects. */
  close(): void {
    this.closing.abort(new ServerError("CANCELLED", "the client was closed"));
    this.stub.close();
  }

  /**
   * Streams the events of one generation. Failures before the first event may be tried again; later ones not.
   * Leaving the loop cancels the call: the server frees the request within a round. Throws ServerError.
   */
  async *generate(prompt: Prompt, options: Options = {}, call: CallOptions = {}): AsyncGenerator<Event, void, void> {
    const requestId = call.requestId ?? "";
    const request = toWire(prompt, options, requestId);
    const signal = this.signalOf(call);
    const attempts = new Attempts(this.retry, call.timeoutMs, signal);
    for (;;) {
      signal.throwIfAborted();
      const stream = this.stub.generate(request, this.metadata, deadline(attempts));
      const release = cancelledBy(signal, stream);
      let begun = false;
      let last: Event | undefined;
      try {
        for await (const response of stream as AsyncIterable<GenerateResponse>) {
          begun = true;
          if (response.event?.$case === "finished") {
            last = response.event; // handed out once the call has ended: the caller may stop reading at it
          } else if (response.event) {
            yield response.event;
          }
        }
        if (!last)
          throw new ServerError("UNKNOWN", "the stream ended without its last message", [], undefined, requestId);
        yield last;
        return;
      } catch (error) {
        signal.throwIfAborted();
        const failure = toError(error, requestId);
        if (begun) throw failure;
        await attempts.again(failure).catch((reason: unknown) => {
          throw signal.aborted ? signal.reason : reason;
        });
      } finally {
        release();
        stream.cancel();
      }
    }
  }

  /** Generates, and returns the whole. */
  async complete(prompt: Prompt, options: Options = {}, call: CallOptions = {}): Promise<Completion> {
    const collector = new Collector();
    for await (const event of this.generate(prompt, options, call)) {
      const completion = collector.add(event);
      if (completion) return completion;
    }
    throw new Error("generate() ends with its last event or an error");
  }

  /** What is served, and how busy it is. */
  async info(call: CallOptions = {}): Promise<GetModelInfoResponse> {
    const signal = this.signalOf(call);
    const attempts = new Attempts(this.retry, call.timeoutMs, signal);
    for (;;) {
      signal.throwIfAborted();
      try {
        return await new Promise<GetModelInfoResponse>((resolve, reject) => {
          const request = { requestId: call.requestId ?? "" };
          const running = this.stub.getModelInfo(request, this.metadata, deadline(attempts), (error, answer) => {
            release();
            if (error) reject(error);
            else resolve(answer);
          });
          const release = cancelledBy(signal, running);
        });
      } catch (error) {
        signal.throwIfAborted();
        await attempts.again(toError(error));
      }
    }
  }

  private signalOf(call: CallOptions): AbortSignal {
    return call.signal ? AbortSignal.any([call.signal, this.closing.signal]) : this.closing.signal;
  }
}

/** Adds events up to a Completion. */
export class Collector {
  private readonly began = performance.now();
  private first: number | undefined;
  private text = "";
  private readonly tokenIds: number[] = [];

  /** Takes one event; the last one gives the whole. */
  add(event: Event): Completion | undefined {
    const now = performance.now();
    if (event.$case === "delta") {
      if (event.value.tokenIds.length) this.first ??= now;
      this.text += event.value.text;
      this.tokenIds.push(...event.value.tokenIds);
    }
    if (event.$case !== "finished") return undefined;
    return {
      text: this.text,
      tokenIds: this.tokenIds,
      finished: event.value,
      ttftMs: (this.first ?? now) - this.began,
      totalMs: now - this.began,
    };
  }
}

function deadline(attempts: Attempts): { deadline?: Date } {
  return attempts.deadline ? { deadline: attempts.deadline } : {};
}

/** Cancels the call when the signal says so; returns what undoes that. */
function cancelledBy(signal: AbortSignal, call: { cancel(): void } | ClientReadableStream<unknown>): () => void {
  const cancel = (): void => call.cancel();
  // A stream that nobody reads any more still reports that it was cancelled.
  if ("on" in call) call.on("error", () => {});
  signal.addEventListener("abort", cancel, { once: true });
  return () => signal.removeEventListener("abort", cancel);
}
