-- A claim tells what its items have in common once, and a settlement says it once (sql/functions/claim.sql, settle.sql).

drop function if exists claim(uuid, uuid, uuid, int, boolean, interval, interval, double precision, int);
drop function if exists settle(uuid, uuid, json, text[], json, double precision, double precision);
drop function if exists call_costs(uuid, given_outcome[]);
drop function if exists observe_outputs(uuid, given_outcome[]);
drop function if exists observe_calls(uuid, given_outcome[], timestamptz, double precision, double precision);
drop type given_outcome;

alter type taken_item drop attribute cost_nano;
create type claim_share as (
    flow int, batch_day date, batch_id uuid, items int, started int, requests int, input_tokens bigint,
    output_tokens bigint, expected_output_tokens bigint, cost_nano bigint, tokens double precision, floor int,
    seqs int[]
);
comment on type claim_share is 'Scratch of claim(): what it took of one flow, together. Never stored.';
