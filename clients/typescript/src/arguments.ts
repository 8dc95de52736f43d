/** The command line's flags, and what they mean for the client. */

import { readFileSync } from "node:fs";
import { parseArgs, type ParseArgsConfig } from "node:util";

import type { ConnectionOptions, Tls } from "./connection.js";
import type { Policy } from "./gen/dspark/v1/scheduler.js";
import type { Options } from "./request.js";

export const USAGE = `usage: dspark generate --prompt TEXT [flags]   complete one prompt
       dspark chat [--system TEXT] [flags]     hold a conversation; /reset starts over, /quit leaves
       dspark tokenize --prompt TEXT           the prompt's token ids, as JSON
       dspark info                             what the server serves, and how busy it is
       dspark watch [--history N] [--every N]  the scheduler's decisions, one JSON object a line
       dspark policy [flags]                   what decides; with flags, change it while the server runs

  --server HOST:PORT    default 127.0.0.1:50051
  --timeout SECONDS     deadline of a call
  --tls                 use TLS, trusting whom Node.js trusts; the flags below imply it
  --tls-ca FILE  --tls-cert FILE  --tls-key FILE  --server-name NAME
  --token-file FILE     file with our bearer token (default: the variable DSPARK_TOKEN)

generate, chat
  --json                print one JSON object (generate)
  --max-tokens N  --temperature X  --top-p X  --top-k N  --seed N  --stop TEXT (several times)
  --speculation off|fixed|threshold|auto  --verification rejection|coupled

policy
  --name plain|fixed|threshold|causal|relayed|auto  --draft-tokens N  --confidence-threshold X
  --max-running N  --prefill-chunk N  --max-queue N  --reset FIELD (several times)`;

const FLAGS = {
  server: { type: "string", default: "127.0.0.1:50051" },
  timeout: { type: "string" },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  tls: { type: "boolean", default: false },
  "tls-ca": { type: "string" },
  "tls-cert": { type: "string" },
  "tls-key": { type: "string" },
  "server-name": { type: "string" },
  "token-file": { type: "string" },
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
  history: { type: "string" },
  every: { type: "string" },
  name: { type: "string" },
  "draft-tokens": { type: "string" },
  "confidence-threshold": { type: "string" },
  "max-running": { type: "string" },
  "prefill-chunk": { type: "string" },
  "max-queue": { type: "string" },
  reset: { type: "string", multiple: true },
} satisfies ParseArgsConfig["options"];

const POLICY = {
  "draft-tokens": "draftTokens",
  "confidence-threshold": "confidenceThreshold",
  "max-running": "maxRunning",
  "prefill-chunk": "prefillChunk",
  "max-queue": "maxQueue",
} as const satisfies Record<string, keyof Policy>;

export type Given = ReturnType<typeof parse>["values"];

/** Wrong usage; ends the process with 2. */
export class UsageError extends Error {}

export function parse(argv: string[]) {
  try {
    return parseArgs({ args: argv, options: FLAGS, allowPositionals: true });
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

/** Flags with one text each. */
type Texts = {
  [K in keyof typeof FLAGS]: (typeof FLAGS)[K] extends { type: "string"; multiple?: never } ? K : never;
}[keyof typeof FLAGS];

/** A flag's number, not negative. */
export function number(given: Given, name: Texts, whole = false): number | undefined {
  const text = given[name];
  if (text === undefined) return undefined;
  const value = Number(text);
  if (text.trim() === "" || !Number.isFinite(value) || value < 0)
    throw new UsageError(`--${name}: not a number: ${text}`);
  if (whole && !Number.isInteger(value)) throw new UsageError(`--${name}: not a whole number: ${text}`);
  return value;
}

function choice<T extends string>(name: string, text: string | undefined, allowed: readonly T[]): T | undefined {
  if (text === undefined || allowed.includes(text as T)) return text as T | undefined;
  throw new UsageError(`--${name}: one of ${allowed.join(", ")}, not ${text}`);
}

export function optionsFrom(given: Given): Options {
  if (given.seed !== undefined && !/^\d+$/.test(given.seed))
    throw new UsageError(`--seed: not a whole number: ${given.seed}`);
  return {
    maxTokens: number(given, "max-tokens", true),
    temperature: number(given, "temperature"),
    topP: number(given, "top-p"),
    topK: number(given, "top-k", true),
    seed: given.seed === undefined ? undefined : BigInt(given.seed),
    stop: given.stop,
    speculation: choice("speculation", given.speculation, ["off", "fixed", "threshold", "auto"]),
    verification: choice("verification", given.verification, ["rejection", "coupled"]),
  };
}

/** What `policy` is to set, and what to set back. */
export function changesFrom(given: Given): { changes: Partial<Policy>; reset: (keyof Policy)[] } {
  const changes: Partial<Policy> = given.name === undefined ? {} : { name: given.name };
  for (const [flag, field] of Object.entries(POLICY) as [keyof typeof POLICY, (typeof POLICY)[keyof typeof POLICY]][]) {
    const value = number(given, flag, flag !== "confidence-threshold");
    if (value !== undefined) changes[field] = value;
  }
  const fields: Record<string, keyof Policy> = { name: "name", ...POLICY };
  const reset = (given.reset ?? []).map((name) => {
    const field = fields[name.replaceAll("_", "-")];
    if (field === undefined) throw new UsageError(`--reset: one of ${Object.keys(fields).join(", ")}, not ${name}`);
    return field;
  });
  return { changes, reset };
}

/** How to reach the server: the flags, and the token's file or variable. */
export function connectionFrom(given: Given, environment: NodeJS.ProcessEnv = process.env): ConnectionOptions {
  const token = tokenFrom(given, environment);
  const [ca, cert, key] = [file(given, "tls-ca"), file(given, "tls-cert"), file(given, "tls-key")];
  if (!cert !== !key) throw new UsageError("--tls-cert and --tls-key come together");
  const serverName = given["server-name"];
  const tls: Tls = { ...(ca && { ca }), ...(cert && key && { cert, key }), ...(serverName && { serverName }) };
  const wanted = given.tls || Object.keys(tls).length > 0;
  return { ...(wanted && { tls }), ...(token && { token }) };
}

function tokenFrom(given: Given, environment: NodeJS.ProcessEnv): string {
  const content = file(given, "token-file");
  const token = (content?.toString("utf8") ?? environment["DSPARK_TOKEN"] ?? "").trim();
  if (!/^[!-~]*$/.test(token) || (content && !token)) {
    const where = content ? `--token-file ${given["token-file"]}` : "DSPARK_TOKEN";
    throw new UsageError(`${where}: not a token, which is one line of visible ASCII characters`);
  }
  return token;
}

function file(given: Given, name: Texts): Buffer | undefined {
  const path = given[name];
  if (path === undefined) return undefined;
  try {
    return readFileSync(path);
  } catch (error) {
    throw new UsageError(`--${name} ${path}: ${(error as NodeJS.ErrnoException).code ?? "cannot be read"}`);
  }
}
