-- A claim tells what its items have in common once, and a settlement says it once (sql/functions/claim.sql, settle.sql).

drop function if exists claim(uuid, uuid, uuid, int, boolean, interval, interval, double precision, int);
drop function if exists settle(uuid, uuid, json, text[], json, double precision, double precision);
drop function if exists call_costs(uuid, given_outcome[]);
drop function if exists observe_outputs(uuid, given_outcome[]);
drop function if exists observe_calls(uuid, given_outcome[], timestamptz, double precision, double precision);
drop type given_outcome;
