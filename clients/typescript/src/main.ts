#!/usr/bin/env node
/** `node dist/main.js generate|chat|tokenize|info|watch|policy`. */

import { changesFrom, connectionFrom, number, optionsFrom, parse, UsageError, USAGE, type Given } from "./arguments.js";
import { chat } from "./chat.js";
import { Client, Collector, type CallOptions, type Completion } from "./client.js";
import { ServerError } from "./errors.js";
import { asJson, errorLines, facts, plain } from "./render.js";
import { SchedulerClient } from "./scheduler.js";

type Command = (client: Client, given: Given, call: CallOptions) => Promise<number>;

async function generate(client: Client, given: Given, call: CallOptions): Promise<number> {
  const collector = new Collector();
  let completion: Completion | undefined;
  for await (const event of client.generate(prompt(given), optionsFrom(given), call)) {
    if (event.$case === "delta" && !given.json) process.stdout.write(event.value.text);
    completion = collector.add(event) ?? completion;
  }
  if (completion && given.json) console.log(JSON.stringify(asJson(completion)));
  else if (completion) process.stderr.write(`\n${facts(completion)}\n`);
  return 0;
}

async function tokenize(client: Client, given: Given, call: CallOptions): Promise<number> {
  console.log(JSON.stringify((await client.tokenize(prompt(given), call)).tokenIds));
  return 0;
}

async function info(client: Client, _: Given, call: CallOptions): Promise<number> {
  console.log(JSON.stringify(await client.info(call), plain, 2));
  return 0;
}

async function watch(client: Client, given: Given, call: CallOptions): Promise<number> {
  const options = { history: number(given, "history", true) ?? 0, every: number(given, "every", true) ?? 1 };
  for await (const { records, lost } of new SchedulerClient(client).watch(options, call)) {
    if (lost) console.error(`${lost} rounds lost: this reader was too slow`);
    for (const record of records) console.log(JSON.stringify(record, plain));
  }
  return 0;
}

async function policy(client: Client, given: Given, call: CallOptions): Promise<number> {
  const scheduler = new SchedulerClient(client);
  const { changes, reset } = changesFrom(given);
  if (Object.keys(changes).length || reset.length) await scheduler.updatePolicy(changes, reset, call);
  console.log(JSON.stringify(await scheduler.policy(call), plain, 2));
  return 0;
}

const COMMANDS: Record<string, Command> = {
  generate,
  chat: (client, given, call) => chat(client, given.system, optionsFrom(given), call),
  tokenize,
  info,
  watch,
  policy,
};

function prompt(given: Given): string {
  if (given.prompt === undefined) throw new UsageError("--prompt is missing");
  return given.prompt;
}

async function main(): Promise<number> {
  const { values: given, positionals } = parse(process.argv.slice(2));
  if (given.help) {
    console.log(USAGE);
    return 0;
  }
  const [name = "", ...rest] = positionals;
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  if (!name) throw new UsageError("which command?");
  if (rest.length || !command) throw new UsageError(`${positionals.join(" ")}: no such command`);
  const timeout = number(given, "timeout");
  const client = new Client(given.server, connectionFrom(given));
  try {
    return await command(client, given, timeout === undefined ? {} : { timeoutMs: timeout * 1000 });
  } finally {
    client.close();
  }
}

// Who reads our output has seen enough.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code === "EPIPE") process.exit(0);
  throw error;
});

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
