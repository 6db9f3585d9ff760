-- Questions about usage: which stretch of time a call belongs to, and whether a value fits a filter.

-- The beginning of the stretch that a moment lies in, by the clock of a time zone.
create or replace function usage_time(p_at timestamptz, p_granularity text, p_zone text) returns timestamptz
language sql stable
as $$
    select case
        when p_granularity like 'second\_%' then
            date_bin(make_interval(secs => split_part(p_granularity, '_', 2)::int), p_at, 'epoch'::timestamptz)
        else date_trunc(p_granularity, p_at, p_zone)
    end
$$;
comment on function usage_time(timestamptz, text, text) is
    'The beginning of the second, minute … year that a moment lies in, in a time zone.';

-- Whether a value fits; p_wanted is one value or an array of them, all as text.
create or replace function usage_fits(p_value text, p_operator text, p_wanted text[]) returns boolean
language sql immutable
as $$
    select case p_operator
        when 'eq' then p_value is not distinct from p_wanted[1]
        when 'neq' then p_value is distinct from p_wanted[1]
        when 'in' then p_value = any (p_wanted)
        when 'nin' then p_value is null or p_value <> all (p_wanted)
        when 'is_not' then p_value is distinct from p_wanted[1]
        -- Only numbers are compared by size: status codes.
        when 'gt' then p_value ~ '^\d{1,18}$' and p_value::bigint > p_wanted[1]::bigint
        when 'gte' then p_value ~ '^\d{1,18}$' and p_value::bigint >= p_wanted[1]::bigint
        when 'lt' then p_value ~ '^\d{1,18}$' and p_value::bigint < p_wanted[1]::bigint
        when 'lte' then p_value ~ '^\d{1,18}$' and p_value::bigint <= p_wanted[1]::bigint
    end
$$;
comment on function usage_fits(text, text, text[]) is 'Whether a dimension''s value fits a filter of a usage query.';
