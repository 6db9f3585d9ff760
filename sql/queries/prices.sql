-- Prices of models. They are read by settle and claim through price_at (sql/functions/price_at.sql).

-- name: price_put
-- A price from a time on, for one workspace or for all; the same name and time again replaces it.
insert into prices (
    price_id, workspace_id, model, input_per_million, cached_per_million, output_per_million, currency, valid_from
)
values (
    %(price_id)s, %(workspace_id)s, %(model)s, %(input_per_million)s, %(cached_per_million)s,
    %(output_per_million)s, %(currency)s, coalesce(%(valid_from)s::timestamptz, clock())
)
on conflict on constraint prices_unique do update
set input_per_million = excluded.input_per_million, cached_per_million = excluded.cached_per_million,
    output_per_million = excluded.output_per_million, currency = excluded.currency;

-- name: prices_list
-- All prices, or those that concern one workspace.
select workspace_id, model, input_per_million, cached_per_million, output_per_million, currency, valid_from
from prices
where %(workspace_id)s::uuid is null or workspace_id is null or workspace_id = %(workspace_id)s
order by workspace_id nulls first, model, valid_from;

-- name: prices_of_resources
-- The currency in which each of some resources is paid for now, and billionths per token; null: no price is known.
select r.resource_id, r.name as resource, r.model, p.currency, p.input_nano, p.output_nano
from resources r
left join lateral price_at(r.workspace_id, r.model, r.model, clock_timestamp()) p on true
where r.workspace_id = %(workspace_id)s and r.resource_id = any (%(resource_ids)s::uuid[])
order by r.name;
