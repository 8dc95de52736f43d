/** What a call can fail with. */

import { Metadata, status, type ServiceError } from "@grpc/grpc-js";

import { BadRequest, RequestInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

export type Code = keyof typeof status;

/** One wrong field of a request, by its path. */
export interface FieldViolation {
  field: string;
  description: string;
}

/** A call that the server, or the way to it, ended with an error. */
export class ServerError extends Error {
  override readonly name = "ServerError";
  /** How many times the call was sent. */
  attempts = 1;

  constructor(
    /** The canonical code's name, such as INVALID_ARGUMENT. */
    readonly code: Code,
    readonly details: string,
    readonly violations: readonly FieldViolation[] = [],
    /** The server's wish, in seconds, if it has one. */
    readonly retryAfterS?: number,
    /** The call's name in the server's log and traces; empty when the call never got there unnamed. */
    readonly requestId = "",
    options?: ErrorOptions,
  ) {
    super(`${code}: ${details}`, options);
  }
}

/** Unpacks a failed call; anything else comes back as it is. */
export function toError(error: unknown, requestId = ""): unknown {
  if (!isServiceError(error)) return error;
  const violations: FieldViolation[] = [];
  let retryAfterS: number | undefined;
  for (const value of error.metadata.get("x-request-id")) requestId = String(value);
  for (const detail of detailsOf(error.metadata)) {
    switch (detail.typeUrl.split("/").at(-1)) {
      case "google.rpc.BadRequest":
        violations.push(...BadRequest.decode(detail.value).fieldViolations);
        break;
      case "google.rpc.RetryInfo": {
        const delay = RetryInfo.decode(detail.value).retryDelay;
        if (delay) retryAfterS = Number(delay.seconds) + delay.nanos / 1e9;
        break;
      }
      case "google.rpc.RequestInfo":
        requestId = RequestInfo.decode(detail.value).requestId;
    }
  }
  return new ServerError(status[error.code] as Code, error.details, violations, retryAfterS, requestId, {
    cause: error,
  });
}

function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error && error.metadata instanceof Metadata;
}

function detailsOf(metadata: Metadata): { typeUrl: string; value: Uint8Array }[] {
  const [packed] = metadata.get("grpc-status-details-bin");
  if (!Buffer.isBuffer(packed)) return [];
  try {
    return Status.decode(packed).details;
  } catch {
    return []; // a proxy's own idea of details; code and message still stand
  }
}
