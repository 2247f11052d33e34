-- Cash of each month in two readings: booked by posting day, restated by the day whose revenue it is.
SELECT
    currency, strftime(date_trunc('month', revenue_date), '%Y-%m') AS month,
    CAST(sum(booked_gross_minor) AS BIGINT) AS booked_gross_minor, CAST(sum(booked_refunds_minor) AS BIGINT) AS booked_refunds_minor,
    CAST(sum(booked_disputes_minor) AS BIGINT) AS booked_disputes_minor, CAST(sum(booked_fees_minor) AS BIGINT) AS booked_fees_minor,
    CAST(sum(booked_net_minor) AS BIGINT) AS booked_net_minor, CAST(sum(restated_net_minor) AS BIGINT) AS restated_net_minor,
    CAST(sum(restated_net_minor) - sum(booked_net_minor) AS BIGINT) AS moved_minor,
    last_day(max(revenue_date)) <= (SELECT max(revenue_date) FROM marts.revenue_daily WHERE complete) AS complete
FROM marts.revenue_daily
GROUP BY currency, date_trunc('month', revenue_date)
ORDER BY currency, month
