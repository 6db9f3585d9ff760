-- What models cost, for those who explain a cost.
create or replace view report.prices with (security_barrier) as
select w.workspace_id,
    w.name as workspace_name,
    p.model,
    p.workspace_id is not null as is_own,
    p.input_per_million,
    p.cached_per_million,
    p.output_per_million,
    p.currency,
    p.valid_from
from report_tenants w
join prices p on p.workspace_id = w.workspace_id or p.workspace_id is null;

comment on view report.prices is
    'Prices that concern a workspace: everyone''s, and its own.';
comment on column report.prices.workspace_id is 'The tenant.';
comment on column report.prices.workspace_name is 'The tenants name.';
comment on column report.prices.model is 'The models name; * stands for any characters.';
comment on column report.prices.is_own is 'Whether it is the workspaces own price.';
comment on column report.prices.input_per_million is 'Price of a million input tokens.';
comment on column report.prices.cached_per_million is 'The same of those that the provider had cached; null: as the others.';
comment on column report.prices.output_per_million is 'Price of a million output tokens.';
comment on column report.prices.currency is 'ISO 4217.';
comment on column report.prices.valid_from is 'It counts for calls claimed from then on.';
