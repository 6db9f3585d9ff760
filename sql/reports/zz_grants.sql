-- The group roles may read the views as they are after this migration. They are made by the first
-- `sluice report grant`, because not every deployment may make roles.
do $$
begin
    if exists (select from pg_roles where rolname = 'sluice_report') then
        grant usage on schema report to sluice_report;
        grant select on all tables in schema report to sluice_report;
        revoke all on report.item_texts from sluice_report;
    end if;
    if exists (select from pg_roles where rolname = 'sluice_report_text') then
        grant usage on schema report to sluice_report_text;
        grant select on report.item_texts to sluice_report_text;
    end if;
end
$$;
