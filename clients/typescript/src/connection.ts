/** How a client reaches a server: TLS, mutual TLS, bearer tokens. */

import { credentials, Metadata, type ChannelCredentials, type ChannelOptions } from "@grpc/grpc-js";

/** PEM contents. */
export interface Tls {
  /** Who may have signed the server's certificate; absent: whom Node.js trusts. */
  ca?: Buffer;
  /** Our certificate and its key, for a server that asks for one. */
  cert?: Buffer;
  key?: Buffer;
  /** The name that the server's certificate must carry, where that is not the address. */
  serverName?: string;
}

/** What opens the connection, and what every call carries. */
export interface ConnectionOptions {
  /** For a server with TLS; without it the connection is not encrypted. */
  tls?: Tls;
  /** The bearer token, for a server that asks for one. */
  token?: string;
  /** Credentials of gRPC's own, in place of `tls`. */
  credentials?: ChannelCredentials;
  /** Sent with every call as well. */
  metadata?: Record<string, string>;
}

const MAX_MESSAGE = 16 * 2 ** 20; // bytes, as the server's
// The same as the Python client's: calls are spread over all addresses of a name, dead connections are noticed.
const CHANNEL: ChannelOptions = {
  "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
  "grpc.max_receive_message_length": MAX_MESSAGE,
  "grpc.max_send_message_length": MAX_MESSAGE,
  "grpc.keepalive_time_ms": 30_000,
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.dns_min_time_between_resolutions_ms": 5_000,
  "grpc.initial_reconnect_backoff_ms": 200,
  "grpc.max_reconnect_backoff_ms": 5_000,
};
const HERE = /^(127\.|localhost|\[::1\]|unix:)/;

/** Throws RangeError for a certificate without its key, or a key without its certificate. */
export function channelCredentials({ credentials: given, tls }: ConnectionOptions): ChannelCredentials {
  if (given) return given;
  if (!tls) return credentials.createInsecure();
  if (!tls.cert !== !tls.key) throw new RangeError("tls: cert and key come together");
  return credentials.createSsl(tls.ca ?? null, tls.key ?? null, tls.cert ?? null);
}

export function channelOptions({ tls }: ConnectionOptions): ChannelOptions {
  return tls?.serverName ? { ...CHANNEL, "grpc.ssl_target_name_override": tls.serverName } : CHANNEL;
}

/** Warns where the token can be read on the way. */
export function callMetadata(address: string, options: ConnectionOptions): Metadata {
  const metadata = new Metadata();
  for (const [name, value] of Object.entries(options.metadata ?? {})) metadata.set(name, value);
  if (options.token === undefined) return metadata;
  if (!options.tls && !options.credentials && !HERE.test(address)) {
    process.emitWarning(`the token travels to ${address} without TLS, readable by everybody on the way`);
  }
  metadata.set("authorization", `Bearer ${options.token}`);
  return metadata;
}
