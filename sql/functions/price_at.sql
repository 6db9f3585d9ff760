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

-- What a call cost, by a price per token; null: no price is known, or nothing was asked.
-- One that brought no usage cost nothing, unless it was answered: then what was reserved is the best that is known.
create or replace function call_cost(
    p_outcome attempt_outcome, p_refund boolean, p_input_tokens int, p_cached_tokens int, p_output_tokens int,
    p_reserved_input_tokens int, p_reserved_output_tokens int, p_input_nano numeric, p_cached_nano numeric,
    p_output_nano numeric
)
returns bigint
language sql immutable parallel safe
as $$
    select case
        when p_input_nano is null or p_outcome in ('lost', 'unsent', 'impossible') then null
        when p_refund or p_outcome = 'throttled' then 0
        when p_outcome <> 'answered' and coalesce(p_input_tokens, p_output_tokens) is null then 0
        else round(
            (coalesce(p_input_tokens, p_reserved_input_tokens)
                - least(coalesce(p_cached_tokens, 0), coalesce(p_input_tokens, 0))) * p_input_nano
            + least(coalesce(p_cached_tokens, 0), coalesce(p_input_tokens, 0)) * p_cached_nano
            + coalesce(p_output_tokens, p_reserved_output_tokens) * p_output_nano)
    end::bigint
$$;
comment on function call_cost(
    attempt_outcome, boolean, int, int, int, int, int, numeric, numeric, numeric
) is 'What a call cost, in billionths of its price''s currency.';
