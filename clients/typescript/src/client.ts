/** A client of `dspark.v1`: `for await (const event of new Client("127.0.0.1:50051").generate("…")) …`. */

import type {
  CallOptions as GrpcCallOptions,
  ChannelCredentials,
  ClientOptions as GrpcClientOptions,
  ClientReadableStream,
  ClientUnaryCall,
  Metadata,
  ServiceError,
} from "@grpc/grpc-js";

import { callMetadata, channelCredentials, channelOptions, type ConnectionOptions } from "./connection.js";
import { ServerError, toError } from "./errors.js";
import {
  GenerationServiceClient,
  type Finished,
  type GenerateResponse,
  type GetModelInfoResponse,
  type TokenizeResponse,
} from "./gen/dspark/v1/generation.js";
import { textToWire, toWire, type ChatPrompt, type Options, type Prompt } from "./request.js";
import { Attempts, DEFAULT_RETRY, type Retry } from "./retry.js";

/** `started`, then `delta`s, then `finished`; `$case` says which. */
export type Event = NonNullable<GenerateResponse["event"]>;

export interface ClientOptions extends ConnectionOptions {
  /** What becomes of calls that nobody answered; NEVER hands every failure on. */
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

/** A unary method of a generated client. */
type Unary<Request, Answer> = (
  request: Request,
  metadata: Metadata,
  options: Partial<GrpcCallOptions>,
  done: (error: ServiceError | null, answer: Answer) => void,
) => ClientUnaryCall;

/** A generated client's constructor. */
type Stub<S> = new (address: string, credentials: ChannelCredentials, options?: Partial<GrpcClientOptions>) => S;

/** Calls one server, or all that a name such as `dns:///dspark-headless:50051` stands for, in turn. */
export class Client {
  private readonly stub: GenerationServiceClient;
  /** What every call carries. */
  readonly metadata: Metadata;
  private readonly credentials: ChannelCredentials;
  private readonly retry: Retry;
  private readonly closing = new AbortController();

  constructor(
    private readonly address: string,
    options: ClientOptions = {},
  ) {
    this.credentials = channelCredentials(options);
    this.stub = new GenerationServiceClient(address, this.credentials, channelOptions(options));
    this.metadata = callMetadata(address, options);
    this.retry = options.retry ?? DEFAULT_RETRY;
  }

  /** A client of another service over the same connection. */
  open<S>(stub: Stub<S>): S {
    return new stub(this.address, this.credentials, { channelOverride: this.stub.getChannel() });
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
    const request = { requestId: call.requestId ?? "" };
    return this.unary(this.stub.getModelInfo.bind(this.stub), request, call);
  }

  /** The prompt's token ids as the server would use them, and the bytes that each stands for. */
  async tokenize(
    text: string | ChatPrompt,
    options: { addSpecialTokens?: boolean } & CallOptions = {},
  ): Promise<TokenizeResponse> {
    const { addSpecialTokens, requestId = "", ...call } = options;
    const request = { requestId, input: textToWire(text), addSpecialTokens };
    return this.unary(this.stub.tokenize.bind(this.stub), request, call);
  }

  /** The ids' text; bytes that form no character become U+FFFD. */
  async detokenize(
    tokenIds: readonly number[],
    options: { skipSpecialTokens?: boolean } & CallOptions = {},
  ): Promise<string> {
    const { skipSpecialTokens, requestId = "", ...call } = options;
    const request = { requestId, tokenIds: [...tokenIds], skipSpecialTokens };
    return (await this.unary(this.stub.detokenize.bind(this.stub), request, call)).text;
  }

  /** One call with one answer, tried again as the client's retry says. */
  async unary<Request, Answer>(method: Unary<Request, Answer>, request: Request, call: CallOptions): Promise<Answer> {
    const signal = this.signalOf(call);
    const attempts = new Attempts(this.retry, call.timeoutMs, signal);
    for (;;) {
      signal.throwIfAborted();
      try {
        return await new Promise<Answer>((resolve, reject) => {
          const running = method(request, this.metadata, deadline(attempts), (error, answer) => {
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

  /** The call's own signal, and the client's end. */
  signalOf(call: { signal?: AbortSignal }): AbortSignal {
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
