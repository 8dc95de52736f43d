#!/usr/bin/env node
/** `node dist/main.js generate|chat|info`. */

import { parseArgs, type ParseArgsConfig } from "node:util";

import { chat } from "./chat.js";
import { Client, Collector, type CallOptions, type Completion } from "./client.js";
import { ServerError } from "./errors.js";
import { asJson, errorLines, facts } from "./render.js";
import type { Options } from "./request.js";

const USAGE = `usage: dspark generate --prompt TEXT [flags]   complete one prompt
       dspark chat [--system TEXT] [flags]     hold a conversation; /reset starts over, /quit leaves
       dspark info                             what the server serves, and how busy it is

  --server HOST:PORT    default 127.0.0.1:50051
  --timeout SECONDS     deadline of a call
  --json                print one JSON object
  --max-tokens N  --temperature X  --top-p X  --top-k N  --seed N  --stop TEXT (several times)
  --speculation off|fixed|threshold|auto  --verification rejection|coupled`;

const FLAGS = {
  server: { type: "string", default: "127.0.0.1:50051" },
  timeout: { type: "string" },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  prompt: { type: "string" },
  system: { type: "string" },
  "max-tokens": { type: "string" },
  temperature: { type: "string" },
  "top-p": { type: "string" },
  "top-k": { type: "string" },
  seed: { type: "string" },
  stop: { type: "string", multiple: true },
  speculation: { type: "string" },
  verification: { type: "string" },
} satisfies ParseArgsConfig["options"];

type Given = ReturnType<typeof parse>["values"];

/** Wrong usage; ends the process with 2. */
class UsageError extends Error {}

function parse(argv: string[]) {
  try {
    return parseArgs({ args: argv, options: FLAGS, allowPositionals: true });
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

function number(given: Given, name: "timeout" | "max-tokens" | "temperature" | "top-p" | "top-k"): number | undefined {
  const text = given[name];
  if (text === undefined) return undefined;
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value) || value < 0)
    throw new UsageError(`--${name}: not a number: ${text}`);
  if (["max-tokens", "top-k"].includes(name) && !Number.isInteger(value)) {
    throw new UsageError(`--${name}: not a whole number: ${text}`);
  }
  return value;
}

function choice<T extends string>(name: string, text: string | undefined, allowed: readonly T[]): T | undefined {
  if (text === undefined || allowed.includes(text as T)) return text as T | undefined;
  throw new UsageError(`--${name}: one of ${allowed.join(", ")}, not ${text}`);
}

function optionsFrom(given: Given): Options {
  if (given.seed !== undefined && !/^\d+$/.test(given.seed))
    throw new UsageError(`--seed: not a whole number: ${given.seed}`);
  return {
    maxTokens: number(given, "max-tokens"),
    temperature: number(given, "temperature"),
    topP: number(given, "top-p"),
    topK: number(given, "top-k"),
    seed: given.seed === undefined ? undefined : BigInt(given.seed),
    stop: given.stop,
    speculation: choice("speculation", given.speculation, ["off", "fixed", "threshold", "auto"]),
    verification: choice("verification", given.verification, ["rejection", "coupled"]),
  };
}

async function generate(client: Client, given: Given, options: Options, call: CallOptions): Promise<void> {
  if (given.prompt === undefined) throw new UsageError("generate needs --prompt");
  const collector = new Collector();
  let completion: Completion | undefined;
  for await (const event of client.generate(given.prompt, options, call)) {
    if (event.$case === "delta" && !given.json) process.stdout.write(event.value.text);
    completion = collector.add(event) ?? completion;
  }
  if (!completion) return;
  if (given.json) console.log(JSON.stringify(asJson(completion)));
  else process.stderr.write(`\n${facts(completion)}\n`);
}

async function info(client: Client, call: CallOptions): Promise<void> {
  const answer = await client.info(call);
  const plain = (_: string, value: unknown): unknown => (typeof value === "bigint" ? Number(value) : value);
  console.log(JSON.stringify(answer, plain, 2));
}

async function main(): Promise<number> {
  const { values: given, positionals } = parse(process.argv.slice(2));
  if (given.help) {
    console.log(USAGE);
    return 0;
  }
  const [command, ...rest] = positionals;
  if (rest.length || !["generate", "chat", "info"].includes(command ?? "")) throw new UsageError("which command?");
  const options = optionsFrom(given);
  const timeout = number(given, "timeout");
  const call = timeout === undefined ? {} : { timeoutMs: timeout * 1000 };
  const client = new Client(given.server);
  try {
    if (command === "chat") return await chat(client, given.system, options, call);
    if (command === "generate") await generate(client, given, options, call);
    else await info(client, call);
    return 0;
  } finally {
    client.close();
  }
}

main().then(
  (code) => {
    process.exitCode = code;
  },
  (error: unknown) => {
    if (error instanceof UsageError) console.error(`${error.message}\n${USAGE}`);
    else if (error instanceof ServerError) console.error(errorLines(error));
    else throw error;
    process.exitCode = error instanceof UsageError ? 2 : 1;
  },
);
