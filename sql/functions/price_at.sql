-- Prices: what a call costs, in billionths of a currency, so that sums of many small calls stay exact.
--
-- The most specific model name that matches counts: of the model that answered or of the one that was asked for (an
-- answer may name a dated one, a deployment may have a name of its own). A workspace's own price comes before
-- everyone's; of several of one name the latest that had begun.
create or replace function price_at(
    p_workspace_id uuid, p_answered text, p_asked text, p_at timestamptz
)
returns table (input_nano numeric, cached_nano numeric, output_nano numeric, currency text)
language sql stable
as $$
    select p.input_per_million * 1000, coalesce(p.cached_per_million, p.input_per_million) * 1000,
        p.output_per_million * 1000, p.currency
    from prices p
    where (p.workspace_id = p_workspace_id or p.workspace_id is null)
        and p.valid_from <= p_at
        and (p_answered like p.model_like or p_asked like p.model_like)
    order by p.workspace_id is null, length(replace(p.model, '*', '')) desc, position('*' in p.model),
        p.valid_from desc
    limit 1
$$;
comment on function price_at(uuid, text, text, timestamptz) is
    'Price per token of a model at a time, in billionths of the currency; no row: none is known.';

-- The cost and the currency of each of some calls, by position. One look per model and claim, not per call.
-- A call that brought no usage cost nothing, unless it was answered: then what was reserved is the best that is known.
create or replace function call_costs(p_workspace_id uuid, p_calls given_outcome[])
returns table (costs bigint[], currencies text[])
language sql stable
as $$
    with asked as materialized (
        select c.resource_id, c.model, c.claimed_at, array_agg(c.ord) as ords
        from unnest(p_calls) c
        where c.outcome not in ('lost', 'unsent', 'impossible')
        group by c.resource_id, c.model, c.claimed_at
    ),
    priced as (
        select o.ord, p.*
        from asked a
        join resources r on r.workspace_id = p_workspace_id and r.resource_id = a.resource_id
        cross join lateral price_at(p_workspace_id, coalesce(a.model, r.model), r.model, a.claimed_at) p
        cross join unnest(a.ords) as o (ord)
    ),
    each_one as (
        select o.ord, null::bigint as cost_nano, null::text as currency from unnest(p_calls) o
        union all
        select p.ord,
            case
                when c.refund or c.outcome = 'throttled' then 0
                when c.outcome <> 'answered' and coalesce(c.input_tokens, c.output_tokens) is null then 0
                else round(
                    (u.input_tokens - u.cached_tokens) * p.input_nano + u.cached_tokens * p.cached_nano
                    + coalesce(c.output_tokens, c.reserved_output_tokens) * p.output_nano)
            end::bigint,
            p.currency
        from priced p
        cross join lateral (select (p_calls[p.ord]).*) c
        cross join lateral (
            select coalesce(c.input_tokens, c.reserved_input_tokens) as input_tokens,
                least(coalesce(c.cached_tokens, 0), coalesce(c.input_tokens, 0)) as cached_tokens
        ) u
    )
    select array_agg(e.cost_nano order by e.ord), array_agg(e.currency order by e.ord)
    from (
        select ord, max(cost_nano) as cost_nano, max(currency) as currency from each_one group by ord
    ) e
$$;
comment on function call_costs(uuid, given_outcome[]) is 'What calls cost, by position.';
