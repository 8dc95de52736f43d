/** The client against a scripted server in this process: `npm test`, after a build. */

import assert from "node:assert/strict";
import { after, beforeEach, test } from "node:test";

import { Metadata, Server, ServerCredentials, status } from "@grpc/grpc-js";

import { Duration } from "../dist/gen/google/protobuf/duration.js";
import { BadRequest, RequestInfo, RetryInfo } from "../dist/gen/google/rpc/error_details.js";
import { Status } from "../dist/gen/google/rpc/status.js";
import { GenerationServiceService, GetModelInfoResponse } from "../dist/gen/dspark/v1/generation.js";
import { Client, NEVER, ServerError } from "../dist/index.js";

const RETRY = { attempts: 4, firstMs: 5, longestMs: 10 };
const started = { event: { $case: "started", value: { promptTokens: 3, cachedTokens: 0 } } };
const finished = { event: { $case: "finished", value: { reason: 3 } } };
const delta = (text) => ({
  event: { $case: "delta", value: { text, tokenIds: [1], logprobs: [], textLengths: [1], fromDraft: [false] } },
});

let calls = [];
let script = () => {}; // what the server does with a call

const server = new Server();
server.addService(GenerationServiceService, {
  generate: (call) => {
    calls.push(call);
    script(call, calls.length);
  },
  tokenize: (call, done) => done({ code: status.UNIMPLEMENTED }),
  detokenize: (call, done) => done({ code: status.UNIMPLEMENTED }),
  getModelInfo: (call, done) => {
    calls.push(call);
    if (calls.length < 3) done({ code: status.UNAVAILABLE, details: "starting" });
    else done(null, GetModelInfoResponse.fromPartial({ model: "m", parameters: 2n ** 60n }));
  },
});
const port = await new Promise((resolve, reject) => {
  const bound = (error, number) => (error ? reject(error) : resolve(number));
  server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), bound);
});
const address = `127.0.0.1:${port}`;
const clients = [];

function connect(retry = RETRY, options = {}) {
  clients.push(new Client(address, { retry, ...options }));
  return clients.at(-1);
}

function fail(call, code, details, typeUrl, detail) {
  const metadata = new Metadata();
  if (typeUrl) {
    const named = {
      typeUrl: "type.googleapis.com/google.rpc.RequestInfo",
      value: RequestInfo.encode({ requestId: "r-9", servingData: "" }).finish(),
    };
    const packed = {
      code,
      message: details,
      details: [named, { typeUrl: `type.googleapis.com/${typeUrl}`, value: detail }],
    };
    metadata.set("grpc-status-details-bin", Buffer.from(Status.encode(packed).finish()));
  }
  call.emit("error", { code, details, metadata });
}

function play(call, ...messages) {
  for (const message of messages) call.write({ requestId: "", ...message });
  call.end();
}

async function collect(events) {
  const seen = [];
  for await (const event of events) seen.push(event.$case === "delta" ? event.value.text : event.$case);
  return seen;
}

beforeEach(() => {
  calls = [];
});
after(() => {
  for (const client of clients) client.close();
  server.forceShutdown();
});

test("events come in order, and the request arrives as it was asked", async () => {
  script = (call) => play(call, started, delta("a"), delta("b"), finished);
  const options = {
    maxTokens: 4,
    temperature: 0,
    seed: 2n ** 64n - 1n,
    stop: ["x"],
    speculation: "fixed",
    draftTokens: 2,
    verification: "coupled",
    logitBias: { 7: -100 },
  };
  const chat = { messages: [{ role: "user", content: "hi" }], templateArguments: { thinking: false } };
  const client = connect(RETRY, { metadata: { authorization: "Bearer t" } });
  assert.deepEqual(await collect(client.generate(chat, options, { requestId: "mine" })), [
    "started",
    "a",
    "b",
    "finished",
  ]);
  const { request, metadata } = calls[0];
  assert.equal(request.requestId, "mine");
  assert.deepEqual(request.prompt.value.messages, chat.messages);
  assert.deepEqual(request.prompt.value.templateArguments, { thinking: false });
  assert.deepEqual([request.maxTokens, request.minTokens, request.stop], [4, undefined, ["x"]]);
  assert.deepEqual(
    [request.sampling.temperature, request.sampling.topP, request.sampling.seed],
    [0, undefined, 2n ** 64n - 1n],
  );
  assert.deepEqual([...Object.entries(request.sampling.logitBias)], [["7", -100]]);
  assert.deepEqual(
    [request.speculation.mode, request.speculation.draftTokens, request.speculation.verification],
    [2, 2, 2],
  );
  assert.deepEqual(metadata.get("authorization"), ["Bearer t"]);
});

test("a seed that a double cannot hold is refused", async () => {
  const client = connect();
  for (const seed of [2 ** 60, 0.5, -1, 2n ** 64n])
    await assert.rejects(collect(client.generate("x", { seed })), RangeError);
  assert.equal(calls.length, 0);
});

test("a call that found nobody is tried again before its first message", async () => {
  script = (call, number) =>
    number < 3 ? fail(call, status.UNAVAILABLE, "restarting") : play(call, started, finished);
  assert.deepEqual(await collect(connect().generate("x")), ["started", "finished"]);
  assert.equal(calls.length, 3);
});

test("a text that has begun is never started over", async () => {
  script = (call) => {
    call.write({ requestId: "", ...started });
    setTimeout(() => fail(call, status.UNAVAILABLE, "gone"), 50);
  };
  await assert.rejects(collect(connect().generate("x")), { name: "ServerError", code: "UNAVAILABLE", attempts: 1 });
  assert.equal(calls.length, 1);
});

test("tries end, and the error says how many there were", async () => {
  script = (call) => fail(call, status.UNAVAILABLE, "restarting");
  await assert.rejects(collect(connect().generate("x")), { code: "UNAVAILABLE", attempts: 4 });
  assert.equal(calls.length, 4);
  await assert.rejects(collect(connect(NEVER).generate("x")), { attempts: 1 });
});

test("a full queue's wish is waited out, but not past the deadline", async () => {
  const later = RetryInfo.encode({ retryDelay: Duration.fromPartial({ seconds: 0n, nanos: 80_000_000 }) }).finish();
  const full = (call) => fail(call, status.RESOURCE_EXHAUSTED, "queue full", "google.rpc.RetryInfo", later);
  script = (call, number) => (number < 2 ? full(call) : play(call, started, finished));
  const began = performance.now();
  assert.deepEqual(await collect(connect().generate("x")), ["started", "finished"]);
  assert.ok(performance.now() - began >= 79);
  calls = [];
  const far = RetryInfo.encode({ retryDelay: Duration.fromPartial({ seconds: 900n }) }).finish();
  script = (call) => fail(call, status.RESOURCE_EXHAUSTED, "queue full", "google.rpc.RetryInfo", far);
  const refusal = { code: "RESOURCE_EXHAUSTED", retryAfterS: 900, requestId: "r-9" };
  await assert.rejects(collect(connect().generate("x", {}, { timeoutMs: 60_000 })), refusal);
  assert.equal(calls.length, 1);
});

test("a wrong request names its fields and is not sent again", async () => {
  const bad = BadRequest.encode(
    BadRequest.fromPartial({ fieldViolations: [{ field: "max_tokens", description: "no" }] }),
  ).finish();
  script = (call) => fail(call, status.INVALID_ARGUMENT, "bad", "google.rpc.BadRequest", bad);
  const error = await collect(connect().generate("x")).catch((reason) => reason);
  assert.ok(error instanceof ServerError);
  assert.deepEqual(
    error.violations.map(({ field, description }) => [field, description]),
    [["max_tokens", "no"]],
  );
  assert.deepEqual([error.code, error.requestId, calls.length], ["INVALID_ARGUMENT", "r-9", 1]);
});

test("the deadline ends a call that hangs", async () => {
  script = () => {};
  await assert.rejects(collect(connect().generate("x", {}, { timeoutMs: 200 })), { code: "DEADLINE_EXCEEDED" });
});

test("leaving the loop, a signal and closing cancel the call", async () => {
  const cancelled = () =>
    new Promise((resolve) => {
      script = (call) => {
        call.on("cancelled", resolve);
        call.write({ requestId: "", ...started });
      };
    });
  let gone = cancelled();
  for await (const event of connect().generate("x")) {
    assert.equal(event.$case, "started");
    break;
  }
  await gone;

  gone = cancelled();
  const abort = new AbortController();
  const reason = new Error("enough");
  await assert.rejects(async () => {
    for await (const _ of connect().generate("x", {}, { signal: abort.signal })) abort.abort(reason);
  }, reason);
  await gone;

  gone = cancelled();
  const client = connect();
  await assert.rejects(
    async () => {
      for await (const _ of client.generate("x")) client.close();
    },
    { code: "CANCELLED" },
  );
  await gone;
  await assert.rejects(collect(client.generate("x")), { code: "CANCELLED" });
});

test("a stream without its last message is an error", async () => {
  script = (call) => play(call, started, delta("a"));
  await assert.rejects(collect(connect().generate("x")), { code: "UNKNOWN" });
});

test("complete adds up, and info is tried again, too", async () => {
  script = (call) => play(call, started, delta("na"), delta("ïve"), finished);
  const { text, tokenIds } = await connect().complete("x");
  assert.deepEqual([text, tokenIds], ["naïve", [1, 1]]);
  calls = [];
  assert.equal((await connect().info({ timeoutMs: 60_000 })).parameters, 2n ** 60n);
  assert.equal(calls.length, 3);
});
