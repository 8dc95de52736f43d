/** A conversation in the terminal, or lines from a pipe. */

import { createInterface } from "node:readline";

import { Collector, type CallOptions, type Client, type Completion } from "./client.js";
import { ServerError } from "./errors.js";
import type { ChatMessage } from "./gen/dspark/v1/generation.js";
import { errorLines, facts } from "./render.js";
import type { Options } from "./request.js";

/** Until the end of input or /quit. Ctrl-C stops a reply. Resolves to 1 when input came from a pipe and a reply failed. */
export async function chat(
  client: Client,
  system: string | undefined,
  options: Options,
  call: CallOptions,
): Promise<number> {
  const beginning = (): ChatMessage[] => (system ? [{ role: "system", content: system }] : []);
  const interactive = process.stdin.isTTY;
  const lines = createInterface({ input: process.stdin, output: interactive ? process.stdout : undefined });
  let stop = new AbortController();
  const interrupted = (): void => stop.abort();
  lines.on("SIGINT", interrupted); // a terminal that edits lines keeps Ctrl-C to itself
  process.on("SIGINT", interrupted);
  let messages = beginning();
  let failed = false;
  lines.setPrompt("you> ");
  if (interactive) lines.prompt();
  for await (const line of lines) {
    const said = line.trim();
    if (said === "/quit" || said === "/exit") break;
    if (said === "/reset") {
      messages = beginning();
    } else if (said.startsWith("/")) {
      console.log("/reset starts over, /quit leaves, Ctrl-C stops a reply");
    } else if (said) {
      stop = new AbortController();
      messages.push({ role: "user", content: said });
      const reply = await answer(client, messages, options, { ...call, signal: stop.signal });
      failed ||= reply === undefined;
      if (reply === undefined) messages.pop();
      else messages.push({ role: "assistant", content: reply });
    }
    if (interactive) lines.prompt();
  }
  lines.close();
  process.off("SIGINT", interrupted);
  return failed && !interactive ? 1 : 0;
}

/** Streams one reply to the screen; a stopped one stands as far as it came, a refused one is undefined. */
async function answer(
  client: Client,
  messages: readonly ChatMessage[],
  options: Options,
  call: CallOptions,
): Promise<string | undefined> {
  const collector = new Collector();
  let text = "";
  let completion: Completion | undefined;
  try {
    for await (const event of client.generate({ messages }, options, call)) {
      if (event.$case === "delta") {
        text += event.value.text;
        process.stdout.write(event.value.text);
      }
      completion = collector.add(event) ?? completion;
    }
  } catch (error) {
    if (!call.signal?.aborted) {
      if (!(error instanceof ServerError)) throw error;
      console.log(errorLines(error));
      if (!text) return undefined;
    }
  }
  console.log(completion ? `\n${facts(completion)}` : "\n[stopped]");
  return text;
}
